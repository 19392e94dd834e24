"""Show a quantised directory to transformers' loader as if its weights were dense."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torchtune import utils

from qst_tune.backbone.directory_format import DirectoryFormat, Layout
from qst_tune.backbone.placing import Placing
from qst_tune.backbone.stored_weight import LazyWeight
from qst_tune.errors import UserError

log = utils.get_logger("INFO")

# Reads a tensor of a file.
_Read = Callable[[], torch.Tensor]


def lazy_state_dict(
    paths: Iterable[Path], stored: DirectoryFormat, dtype: torch.dtype
) -> dict[str, Any]:
    """Name the weights of a directory; each is read once the loader comes to it.

    Args:
        paths (Iterable[Path]): of the files of weights.
        stored (DirectoryFormat): how they are stored.
        dtype (torch.dtype): of dense weights.

    Returns:
        dict[str, Any]: by the names that a dense directory would have; a value has ``[...]``.

    Raises:
        UserError: if a file cannot be read, or nothing in it is stored so.
    """
    readers = {name: read for path in paths for name, read in _readers(path)}
    weights: dict[str, Any] = {}
    used: set[str] = set()
    for stem, layout in _stems(readers, stored.layouts):
        own = {part: stem + part for part in layout.parts if stem + part in readers}
        read = {part.lstrip("._"): readers[name] for part, name in own.items()}
        name = stem + layout.target
        weights[name] = LazyWeight(name, read, stored.decode, dtype)
        used.update(own.values())
    if not weights:
        raise UserError(
            f"config.json: quantization_config says {stored.title}, but no weight is stored so "
            f"(no tensor is named *{stored.layouts[0].needs})"
        )
    dense = {name: _Lazy(read) for name, read in readers.items() if name not in used}
    return {**dense, **weights}


class _Lazy:
    """A tensor that is stored as it is."""

    def __init__(self, read: _Read) -> None:
        self._read = read

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._read()[index]


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


def _readers(path: Path) -> Iterator[tuple[str, _Read]]:
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, "pt")
            for name in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118  # not a dict
                yield name, partial(file.get_tensor, name)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            for name, tensor in weights.items():
                yield name, partial(_same, tensor)
    except Exception as error:  # each format has errors of its own
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is damaged, or holds more than weights: {reason}") from error


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def check_unused(unexpected: Iterable[str], weights: Mapping[str, Any], folder: Path) -> None:
    """Refuse biases that the model has no place for, and count what else it has none for.

    Args:
        unexpected (Iterable[str]): names that the loader had no use for.
        weights (Mapping[str, Any]): from :func:`lazy_state_dict`.
        folder (Path): the directory, for messages.

    Raises:
        UserError: if one is not zero. (AutoGPTQ wrote zeros for linears without a bias.)
    """
    biases = {name for name in unexpected if name.endswith(".bias")}
    for name in sorted(biases):
        if name not in weights or weights[name][...].any():
            raise UserError(f"{folder} has a bias that the model lacks: {name}")
    others = sorted(set(unexpected) - biases)
    if others:
        log.info(f"{len(others)} tensors of {folder} are not used, for example {others[0]}")


def report(place: Placing) -> None:
    """Log what became of the weights of a directory.

    Args:
        place (Placing): after loading.
    """
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
