"""Key-value caches for the attentions of any torchtune decoder, both networks of QST included."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torchtune.modules import TransformerDecoder


class GrowingCache:
    """Keys and values of one attention; stands where torchtune's ``KVCache`` stands.

    torchtune's cache has a fixed length, and every token attends through all of it. This one shows
    what is filled and nothing else, doubles when it is full, and can forget its end.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def update(self, k_val: torch.Tensor, v_val: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values.

        Args:
            k_val (torch.Tensor): ``[B, H, T, C]``.
            v_val (torch.Tensor): ``[B, H, T, C]``.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: all so far, each ``[B, H, length, C]``.
        """
        start, self.length = self.length, self.length + k_val.shape[2]
        keys = self._keys = _with_room(self._keys, k_val, start)
        values = self._values = _with_room(self._values, v_val, start)
        keys[:, :, start : self.length] = k_val
        values[:, :, start : self.length] = v_val
        return keys[:, :, : self.length], values[:, :, : self.length]

    def cut(self, length: int) -> None:
        """Forget everything from a position on.

        Args:
            length (int): tokens to keep; nothing happens if there are no more than that.
        """
        self.length = min(self.length, length)


def _with_room(held: torch.Tensor | None, new: torch.Tensor, start: int) -> torch.Tensor:
    """The held tensor, or a longer copy of its first ``start`` tokens that has room for ``new``."""
    needed = start + new.shape[2]
    if held is not None and held.shape[2] >= needed:
        return held
    room = new.new_empty(*new.shape[:2], max(needed, 2 * start), new.shape[3])
    if held is not None:
        room[:, :, :start] = held[:, :, :start]
    return room


def attentions(model: TransformerDecoder) -> list[Any]:
    """List a decoder's attentions: the backbone's from first to last, then the side network's.

    Args:
        model (TransformerDecoder): any torchtune decoder.

    Returns:
        list[Any]: each once.
    """
    # By what they can do, since Gemma 2's is no MultiHeadAttention.
    return [module for module in model.modules() if hasattr(module, "cache_enabled")]


@contextmanager
def attached(model: TransformerDecoder, caches: Sequence[Any]) -> Iterator[None]:
    """Let each attention use a cache for as long as the context lasts.

    Args:
        model (TransformerDecoder): without caches of its own.
        caches (Sequence[Any]): with ``update``, one for each of :func:`attentions`.

    Yields:
        None: meanwhile the model wants ``mask`` and ``input_pos``.
    """
    layers = attentions(model)
    for layer, cache in zip(layers, caches, strict=True):
        layer.kv_cache, layer.cache_enabled = cache, True
    try:
        yield
    finally:
        for layer in layers:
            layer.kv_cache, layer.cache_enabled = None, False


class ModelCaches:
    """Keys and values of all attentions of a model: those of the backbone and of the side network.

    Args:
        model (Any): a ``QSTModel`` or ``PEQADecoder`` in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._own = [GrowingCache() for _ in attentions(model)]
        # Over transformers the backbone's attentions are not torchtune's, and have their own cache.
        new_cache = getattr(getattr(model, "backbone", None), "new_cache", None)
        self._frozen = None if new_cache is None else new_cache()

    def cut(self, length: int, num_new: int) -> int:
        """Forget everything from a position on.

        Args:
            length (int): tokens to keep, of those that are there.
            num_new (int): tokens that the next pass adds to them.

        Returns:
            int: tokens that are kept; 0 where the backbone must begin again.
        """
        kept = length if self._frozen is None else self._frozen.cut(length, num_new)
        for cache in self._own:
            cache.cut(kept)
        return kept

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the model use them for as long as the context lasts.

        Yields:
            None: meanwhile the model wants ``mask`` and ``input_pos``.
        """
        with attached(self._model, self._own):
            if self._frozen is None:
                yield
                return
            with self._frozen.attached():
                yield


@contextmanager
def without_head(model: Any) -> Iterator[None]:
    """Let a decoder of ours return the LM head's input for as long as the context lasts.

    Args:
        model (Any): a ``QSTDecoder`` or ``PEQADecoder``. Of a long prompt only the last token's
            logits are wanted: all of them would be the largest tensor of the pass.

    Yields:
        None: meanwhile the model returns ``[B, T, D]``.
    """
    before = model.skip_output_layer
    model.skip_output_layer = True
    try:
        yield
    finally:
        model.skip_output_layer = before
