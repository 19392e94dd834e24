"""A weight is decoded once: for all parts of a batch, or for all tokens of a text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# By the stored weight's id, which stays its own as long as it is kept, and by dtype.
Decoded = dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]]
_kept: ContextVar[Decoded | None] = ContextVar("kept", default=None)


@contextmanager
def decoding_once(kept: Decoded | None = None) -> Iterator[None]:
    """Keep every weight that :func:`decoded` decodes in here, in ``kept`` if it is given."""
    token = _kept.set({} if kept is None else kept)
    try:
        yield
    finally:
        _kept.reset(token)


def keeps_decoded() -> bool:
    """Whether :func:`decoded` keeps what it decodes."""
    return _kept.get() is not None


def decoded(
    stored: torch.Tensor, dtype: torch.dtype, decode: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Decode a weight that ``stored`` identifies, or return what was decoded before, unchanged."""
    kept = _kept.get()
    if kept is None or torch.compiler.is_compiling():
        return decode()
    key = id(stored), dtype
    if key not in kept:
        kept[key] = stored, decode()
    return kept[key][1]
