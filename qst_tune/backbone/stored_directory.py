"""Show a quantised directory to transformers' loader as if its weights were dense."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torchtune import utils

from qst_tune.backbone.directory_format import DirectoryFormat, Layout
from qst_tune.backbone.placing import Placing
from qst_tune.backbone.stored_weight import LazyWeight
from qst_tune.backbone.weights_file import read_weights_file
from qst_tune.errors import UserError

log = utils.get_logger("INFO")


def lazy_state_dict(
    paths: Iterable[Path], stored: DirectoryFormat, dtype: torch.dtype
) -> dict[str, Any]:
    """Name a directory's weights as a dense one would; the loader reads each with ``[...]``.

    ``dtype`` is that of decoded weights. UserError if a file cannot be read, or no weight is stored
    as ``stored`` says.
    """
    tensors = {name: tensor for path in paths for name, tensor in read_weights_file(path).items()}
    weights: dict[str, Any] = {}
    used: set[str] = set()
    for stem, layout in _stems(tensors, stored.layouts):
        own = {part: stem + part for part in layout.parts if stem + part in tensors}
        parts = {part.lstrip("._"): tensors[name] for part, name in own.items()}
        name = stem + layout.target
        weights[name] = LazyWeight(name, parts, stored.decode, dtype)
        used.update(own.values())
    if not weights:
        raise UserError(
            f"config.json: quantization_config is of {stored.title}, but no weight is stored so "
            f"(no tensor is named *{stored.layouts[0].needs})"
        )
    return {name: tensor for name, tensor in tensors.items() if name not in used} | weights


def _stems(names: Mapping[str, Any], layouts: Iterable[Layout]) -> Iterator[tuple[str, Layout]]:
    for layout in layouts:
        for name in names:
            stem = name.removesuffix(layout.main)
            if stem != name and stem + layout.needs in names:
                yield stem, layout
            elif stem != name and layout.main != layout.target:
                raise UserError(
                    f"the weights are damaged: {name} is there, {stem}{layout.needs} not"
                )


def check_unused(unexpected: Iterable[str], weights: Mapping[str, Any], directory: Path) -> None:
    """Refuse biases that the model has no place for, and count the other unused tensors.

    UserError if a bias is not zero. (AutoGPTQ wrote zeros for linears without a bias.)
    """
    biases = {name for name in unexpected if name.endswith(".bias")}
    for name in sorted(biases):
        if name not in weights or weights[name][...].any():
            raise UserError(f"{directory} has a bias that the model lacks: {name}")
    others = sorted(set(unexpected) - biases)
    if others:
        log.info(f"{len(others)} tensors of {directory} are not used, for example {others[0]}")


def report(place: Placing) -> None:
    """Log what became of the weights of a directory."""
    assert place.stored is not None
    tally = place.tally
    parts = []
    if tally.taken_over:
        parts.append(f"{tally.taken_over} weights taken over as they are")
    if tally.rounded:
        target = "nf4" if place.base_quantization == "auto" else place.base_quantization
        parts.append(
            f"{tally.rounded} weights decoded and rounded to {target}, which adds an error of "
            f"{100 * tally.relative_error:.2f} % (root mean square)"
        )
    log.info(f"{place.stored.title}: {'; '.join(parts) or 'all weights decoded'}")
