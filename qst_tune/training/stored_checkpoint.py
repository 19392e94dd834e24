"""The integer weights of a quantised directory under torchtune's names, with their codes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torchtune import utils

from qst_tune.backbone.directory_format import DirectoryFormat
from qst_tune.backbone.stored_directory import lazy_state_dict
from qst_tune.backbone.stored_weight import StoredWeight
from qst_tune.errors import UserError
from qst_tune.models.hf.weights import Weights
from qst_tune.quantization.affine import AffineWeight
from qst_tune.quantization.stored import StoredAffine

log = utils.get_logger("INFO")


def stored_weights(
    paths: Sequence[Path], stored: DirectoryFormat, convert: Callable[[Weights], Weights]
) -> Iterator[Weights]:
    """Read one weight after the other.

    Args:
        paths (Sequence[Path]): of the files of weights.
        stored (DirectoryFormat): of integers.
        convert (Callable[[Weights], Weights]): from Hugging Face's names to torchtune's; it may
            change the order of a weight's rows or split it.

    Yields:
        Weights: one weight, or those that it is split into; a linear's as ``StoredWeight``.

    Raises:
        UserError: if a file cannot be read, or a linear of the layers is stored without codes.
    """
    taken_over = 0
    for name, lazy in lazy_state_dict(paths, stored, torch.float32).items():
        weight = lazy[...]
        if isinstance(weight, StoredWeight) and ".layers." not in name:
            weight = weight.dense()  # an LM head in codes
        if not isinstance(weight, StoredWeight):
            if ".layers." in name and weight.ndim == 2:
                raise UserError(
                    f"{name} is dense in a directory of {stored.title}: PEQA over such a mixture "
                    "is not supported; use QST (auto/qst)"
                )
            yield convert({name: weight})
            continue
        taken_over += 1
        # torchtune turns rows of q and k around for its rotary embeddings; numbers show how.
        numbers = torch.arange(len(weight), dtype=torch.int32)
        numbered = convert({name: numbers[:, None].expand(weight.shape)})
        yield {own: _rows(weight, rows[:, 0].long()) for own, rows in numbered.items()}
    log.info(f"{stored.title}: {taken_over} weights taken over as they are")


def _rows(weight: StoredWeight, rows: torch.Tensor) -> StoredWeight:
    whole = weight.pieces[0][0]
    assert isinstance(whole, StoredAffine)
    part = AffineWeight(*(values[rows] for values in whole.weight))
    stored = StoredAffine(part, whole.layout, whole.order)
    return StoredWeight([[stored]], stored.shape, weight.dtype)
