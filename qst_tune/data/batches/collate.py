"""Batches of unpacked rows, with labels in the place of the token that predicts them.

Datasets label each token with itself. Batches hold at position t the label that the model must
predict there, the token of t + 1 in the same row, so that no loss has to know where rows end.
Notation: B batch, T tokens.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from qst_tune.data.batches.loader import Batch, Collate
from qst_tune.errors import UserError
from qst_tune.modules.model_limits import ModelLimits
from qst_tune.torchtune_compat import component_of

LENGTH_MULTIPLE = 16
DEFAULT_COLLATE = "torchtune.data.padded_collate_sft"


def align_labels(
    labels: torch.Tensor,
    *,
    ignore_index: int = CROSS_ENTROPY_IGNORE_IDX,
    input_pos: torch.Tensor | None = None,
) -> torch.Tensor:
    """Move each label ``[B, T]`` to the position that predicts it.

    Nothing follows the last position of a row, nor, where one row holds several samples, a position
    after which ``input_pos`` ``[B, T]`` is not the following number: its label is ``ignore_index``.
    """
    aligned = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    if input_pos is None:
        return aligned
    ends = F.pad(input_pos[..., 1:] != input_pos[..., :-1] + 1, (0, 1), value=True)
    return aligned.masked_fill(ends, ignore_index)


def build_collate(limits: ModelLimits, component: str = DEFAULT_COLLATE) -> Collate:
    """Build the function that makes ``tokens`` and aligned ``labels`` ``[B, T]`` of unpacked rows.

    Rows are padded on the right to the longest, and on to a multiple of 16 tokens, at most the
    model's ``max_seq_len``: on a CPU every new length compiles some forty matrix kernels that stay
    in memory, 0.75 GiB over one epoch of SmolLM2-135M. ``component`` is a collate function of
    torchtune's form.
    """
    pad_id, ignore_index = limits.pad_id, limits.ignore_index
    padding = {"padding_idx": pad_id, "ignore_idx": ignore_index}
    try:
        function = component_of(component)
        collate = partial(function, **padding)
    except Exception as error:  # importing a user's own module may raise anything
        raise UserError(f"collate_fn={component} cannot be imported") from error
    if not _takes(function, [{}], **padding):
        raise UserError(
            f"collate_fn={component} must take a list of rows, padding_idx and ignore_idx"
        )
    fill = {"tokens": pad_id, "labels": ignore_index}
    return partial(_collate_and_pad, collate=collate, fill=fill, max_seq_len=limits.max_seq_len)


def _takes(function: Callable[..., Any], *args: object, **kwargs: object) -> bool:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def _collate_and_pad(
    rows: list[Any], *, collate: Collate, fill: dict[str, int], max_seq_len: int
) -> Batch:
    batch = collate(rows)
    length = batch["tokens"].shape[1]
    missing = max(0, min(length + -length % LENGTH_MULTIPLE, max_seq_len) - length)
    if batch.keys() - fill.keys():  # a mask or positions of the user's own have this length
        missing = 0
    labels = align_labels(
        batch["labels"], ignore_index=fill["labels"], input_pos=batch.get("input_pos")
    )
    parts = {"tokens": batch["tokens"], "labels": labels}
    return batch | {key: F.pad(part, (0, missing), value=fill[key]) for key, part in parts.items()}
