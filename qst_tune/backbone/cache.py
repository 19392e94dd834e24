"""Keys, values and states of a transformers backbone, for the next pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import proxy

import torch

from qst_tune.backbone.text_model import carries_state, has_windows
from qst_tune.errors import UserError

if TYPE_CHECKING:
    from transformers import Cache

# Types whose code takes no cache but one of its own class.
_OWN_CACHE = ("minimax",)


class TransformersCache:
    """A cache of transformers that can forget its end, where the model allows it.

    Layers with a sliding window keep all keys here, as those without do: cut to its window, a layer
    could not go back to an earlier token. Masks still hide what is outside the window. A model with
    a state along the row (Mamba, linear attention) cannot go back at all, and begins again.

    ``length`` is the number of tokens in it. UserError if the model takes no cache of transformers.

    With a ``slot``, ``[1]`` int64, a pass of one token writes at that place in tensors that
    :meth:`reserve` made, and reads all of them; then ``length`` is the caller's to set.
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
        self.slot: torch.Tensor | None = None
        self._slots: list[SlotLayer] = []
        self._is_in_slots = False  # which of the two has all tokens
        self.cache = cache
        if cache is None:
            self._renew()

    @property
    def has_slots(self) -> bool:
        """Whether a slot can be used: all layers keep all keys, and attention takes any mask."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        config = self._backbone.config
        kinds = {type(layer) for layer in self.cache.layers} - {DynamicLayer}
        is_plain = type(self.cache) is DynamicCache and not kinds and not self._is_stateful
        is_sdpa = getattr(config, "_attn_implementation", None) == "sdpa"
        return is_plain and is_sdpa and not has_windows(config)

    def reserve(self, room: int) -> bool:
        """Make room for ``room`` tokens in tensors that stay, with those that are there.

        Returns whether these are other tensors than before.
        """
        if self._is_in_slots and self._slots[0].room == room:
            return False
        self._leave_slots()
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        moves = len(self._slots) != len(layers) or not self._slots[0].fits(layers[0].keys, room)
        if moves:
            slot_layer = _slot_layer()
            self._slots = [slot_layer(self, one.keys, one.values, room) for one in layers]
        for slots, layer in zip(self._slots, layers, strict=True):
            slots.take(layer.keys, layer.values)
        self._is_in_slots = True
        return moves

    def drop_slots(self) -> None:
        """Take transformers' cache, with the tokens before the slots took them over."""
        if self._is_in_slots:
            self._is_in_slots = False
            held = [layer for layer in self.cache.layers if layer.is_initialized]
            self.length = int(held[0].get_seq_length())

    def _leave_slots(self) -> None:
        """Give transformers' cache the tokens again."""
        if not self._is_in_slots:
            return
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        for slots, layer in zip(self._slots, layers, strict=True):
            layer.keys = slots.keys[:, :, : self.length]
            layer.values = slots.values[:, :, : self.length]
        self._is_in_slots = False

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
        self._leave_slots()
        if self._is_stateful or not length:
            self._renew()
            return 0
        for layer in self.cache.layers:
            layer.crop(min(0, length - layer.get_seq_length()))
        self.length, self._is_whole = length, True
        return length

    @contextmanager
    def extended(self, num_new: int) -> Iterator[Any]:
        """Let a pass of ``num_new`` tokens read and extend transformers' cache, or the slots."""
        if self.slot is not None:
            yield self._with_slots()
            return
        self._leave_slots()
        self._is_whole = False
        yield self.cache
        self.length, self._is_whole = self.length + num_new, True

    def _with_slots(self) -> "Cache":
        """Return a cache of the slots; layers that never ran, as those that share keys, stay."""
        from transformers import DynamicCache

        cache = DynamicCache()
        slots = iter(self._slots)
        layers: list[Any] = [
            next(slots) if layer.is_initialized else layer for layer in self.cache.layers
        ]
        cache.layers = layers
        return cache

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the backbone's passes use the cache; each takes the tokens that follow."""
        self._backbone.cache = self
        try:
            yield
        finally:
            self._backbone.cache = None


class SlotLayer:
    """One layer of a cache, whose tensors stay where they are."""

    is_sliding, is_initialized, is_compileable = False, True, True

    def __init__(
        self, owner: TransformersCache, keys: torch.Tensor, values: torch.Tensor, room: int
    ) -> None:
        # No cycle: keys and values are free as soon as nobody has the cache.
        self._owner: TransformersCache = proxy(owner)
        self.room = room
        self.keys, self.values = (
            held.new_zeros(*held.shape[:2], room, held.shape[3]) for held in (keys, values)
        )

    def fits(self, keys: torch.Tensor, room: int) -> bool:
        """Whether keys of a layer, ``[B, H, T, C]``, go into this room."""
        return self.room == room and len(self.keys) == len(keys)

    def take(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy keys and values of a layer, the first of the room."""
        self.keys[:, :, : keys.shape[2]] = keys
        self.values[:, :, : keys.shape[2]] = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token's keys and values ``[B, H, 1, C]``; return those of the whole room."""
        slot = self._owner.slot
        assert slot is not None
        self.keys.index_copy_(2, slot, key_states)
        self.values.index_copy_(2, slot, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the number of tokens before this one, which models count positions from."""
        return self._owner.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys there are, and the first one's place."""
        return self.room, 0


@lru_cache(maxsize=1)
def _slot_layer() -> type[SlotLayer]:
    """Return :class:`SlotLayer` as one of transformers' own kinds, which is imported late."""
    from transformers.cache_utils import DynamicLayer

    kind: type[SlotLayer] = type("SlotLayer", (SlotLayer, DynamicLayer), {})
    return kind


def _without_window(layer: Any) -> Any:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer
