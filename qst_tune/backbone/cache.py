"""Keys, values and states of a transformers backbone, for the next pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qst_tune.backbone.text_model import carries_state
from qst_tune.errors import UserError

# Types whose code takes no cache but one of its own class.
_OWN_CACHE = ("minimax",)


class TransformersCache:
    """A cache of transformers that can forget its end, where the model allows it.

    Layers with a sliding window keep all keys here, as those without do: cut to its window, a layer
    could not go back to an earlier token. Masks still hide what is outside the window. A model with
    a state along the row (Mamba, linear attention) cannot go back at all, and begins again.

    ``length`` is the number of tokens in it. UserError if the model takes no cache of transformers.
    """

    def __init__(self, backbone: Any, cache: Any = None) -> None:
        if backbone.config.model_type in _OWN_CACHE:
            raise UserError(
                f"model_type={backbone.config.model_type!r} takes no cache but its own in "
                "transformers: it trains and is evaluated, but does not generate here"
            )
        self._backbone = backbone
        self._is_stateful = carries_state(backbone.model, backbone.config)
        self._is_whole = True  # no pass was left in the middle
        self.length = 0
        self.cache = cache
        if cache is None:
            self._renew()

    def _renew(self) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self._backbone.config)
        if not self._is_stateful:
            self.cache.layers = [_without_window(layer) for layer in self.cache.layers]
        self.length, self._is_whole = 0, True

    def cut(self, length: int, num_new: int = 1) -> int:
        """Forget all tokens after the first ``length``; return ``length``, or 0 to begin again.

        A model with a state cannot go back. ``num_new`` tokens are in the next pass: transformers'
        Mamba is wrong where several tokens at once continue a state (5.23, 0.06 where 1e-6 is
        right).
        """
        is_continued = self._is_whole and length == self.length
        if is_continued and not (self._is_stateful and num_new > 1):
            return length
        if self._is_stateful or not length:
            self._renew()
            return 0
        for layer in self.cache.layers:
            layer.crop(min(0, length - layer.get_seq_length()))
        self.length, self._is_whole = length, True
        return length

    @contextmanager
    def extended(self, num_new: int) -> Iterator[Any]:
        """Let a pass of ``num_new`` tokens read and extend transformers' cache."""
        self._is_whole = False
        yield self.cache
        self.length, self._is_whole = self.length + num_new, True

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the backbone's passes use the cache; each takes the tokens that follow."""
        self._backbone.cache = self
        try:
            yield
        finally:
            self._backbone.cache = None


def _without_window(layer: Any) -> Any:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer
