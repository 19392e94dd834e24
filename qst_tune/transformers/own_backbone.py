"""A pass of a side network and transformers' own model as its backbone, with one shared cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from qst_tune.backbone.cache import TransformersCache
from qst_tune.backbone.qst_transformer import QSTTransformer
from qst_tune.generation.caches import attached, attentions, without_head


def num_cache_layers(model: QSTTransformer) -> int:
    """Count the layers of a cache for the backbone alone.

    Args:
        model (QSTTransformer): may be on meta.

    Returns:
        int: the side network's layers come after them.
    """
    return len(DynamicCache(config=model.backbone.config).layers)


def head_input(
    model: QSTTransformer,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Any,
) -> torch.Tensor:
    """Run both networks.

    Args:
        model (QSTTransformer): in evaluation mode.
        tokens (torch.Tensor): ``[B, T]``, those after the cached ones.
        attention_mask (torch.Tensor | None): ``[B, L]``, 0 for padding; or
            ``[B, T, T]`` booleans of packed rows.
        position_ids (torch.Tensor | None): ``[B, T]``.
        cache (Any): a ``DynamicCache`` to read and extend, or None.

    Returns:
        torch.Tensor: the LM head's input, ``[B, T, D]``.

    Raises:
        ValueError: if the mask or the cache is of another kind.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        raise ValueError(
            f"attention_mask with {attention_mask.ndim} dimensions is not supported over "
            f"{model.backbone.config.model_type}: give [batch, tokens], 0 for padding"
        )
    mask = None if attention_mask is None else attention_mask.bool()
    with _shared(model, cache), without_head(model):
        y_BTD: torch.Tensor = model(tokens, mask=mask, input_pos=position_ids)
    return y_BTD


@contextmanager
def _shared(model: QSTTransformer, cache: Any) -> Iterator[None]:
    """Let the backbone use a cache's first layers, and the side network the rest."""
    if cache is None:
        yield
        return
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"{type(cache).__name__} is not supported over {model.backbone.config.model_type}: "
            "use the default, DynamicCache"
        )
    first = num_cache_layers(model)
    length = cached_length(model, cache)
    frozen = TransformersCache(model.backbone, cache)
    frozen.length = length
    if not length:  # generate() made it for the side network's configuration
        own = TransformersCache(model.backbone).cache.layers
        cache.layers = [*own, *cache.layers[first:]]
    layers = [_SideLayer(cache, first + index) for index in range(len(attentions(model)))]
    with attached(model, layers), frozen.attached():
        yield


def cached_length(model: QSTTransformer, cache: Any) -> int:
    """Count the tokens in a shared cache.

    Args:
        model (QSTTransformer): whose cache it is.
        cache (Any): of transformers, or None.

    Returns:
        int: as the side network's first layer has them: the backbone's may have none that count.
    """
    return 0 if cache is None else int(cache.get_seq_length(num_cache_layers(model)))


class _SideLayer:
    """One layer of the cache, where torchtune's attention looks for its own."""

    def __init__(self, cache: Any, index: int) -> None:
        self._cache, self._index = cache, index

    def update(self, k_val: torch.Tensor, v_val: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._cache.update(k_val, v_val, self._index)
        return keys, values
