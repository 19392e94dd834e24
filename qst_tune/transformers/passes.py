"""A pass of both networks over one cache of transformers.

The attentions of the backbone use the first layers of a cache, those of the side network the rest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, DynamicCache

from qst_tune.backbone.cache import TransformersCache
from qst_tune.backbone.transformers_models import QSTTransformer
from qst_tune.generation.caches import attached, attentions, without_head
from qst_tune.modules.qst_model import QSTModel
from qst_tune.transformers.masks import attention_mask_of, positions_of


def num_cache_layers(model: QSTModel) -> int:
    """Count the layers of a cache for transformers' own model as the backbone; may be on meta."""
    if not isinstance(model, QSTTransformer):
        return 0
    return len(DynamicCache(config=model.backbone.config).layers)


def cached_length(model: QSTModel, cache: Cache | None) -> int:
    """Count the tokens in a cache, by a layer that counts: some of a backbone do not."""
    return 0 if cache is None else int(cache.get_seq_length(num_cache_layers(model)))


def head_input(
    model: QSTModel,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
) -> torch.Tensor:
    """Run both networks up to the LM head's input, ``[B, T, D]``; read and extend the cache.

    ``tokens``, ``[B, T]``, are those after the cached ones. ``attention_mask`` is ``[B, L]``, 0 for
    padding, or ``[B, T, T]`` booleans of packed rows; over torchtune's modules also ``[B, 1, T,
    L]`` booleans. ValueError if the mask or the cache is of another kind.
    """
    start = cached_length(model, cache)
    if isinstance(model, QSTTransformer):
        _check(model, attention_mask, cache)
        mask = None if attention_mask is None else attention_mask.bool()
        caches = _shared(model, cache, start)
    else:
        where: dict[str, Any] = {"start": start, "length": start + tokens.shape[1], "like": tokens}
        mask = attention_mask_of(attention_mask, **where)
        if position_ids is None:
            position_ids = positions_of(attention_mask, **where)
        # Asked in this order: to look into a mask stops a GPU.
        if cache is None and (attention_mask is None or bool((attention_mask == 1).all())):
            mask = None  # torchtune's own causal attention is faster
        caches = _attached(model, cache, 0, where["length"])
    with caches, without_head(model):
        y_BTD: torch.Tensor = model(tokens, mask=mask, input_pos=position_ids)
    return y_BTD


def _check(model: QSTTransformer, attention_mask: torch.Tensor | None, cache: Any) -> None:
    kind = model.backbone.config.model_type
    if attention_mask is not None and attention_mask.ndim == 4:
        raise ValueError(
            f"attention_mask with 4 dimensions is not supported over {kind}: give [batch, tokens], "
            "0 for padding"
        )
    if cache is not None and not isinstance(cache, DynamicCache):
        raise ValueError(
            f"{type(cache).__name__} is not supported over {kind}: use the default, DynamicCache"
        )


@contextmanager
def _shared(model: QSTTransformer, cache: Any, length: int) -> Iterator[None]:
    """Let the backbone use a cache's first layers, and the side network the rest."""
    if cache is None:
        yield
        return
    first = num_cache_layers(model)
    frozen = TransformersCache(model.backbone, cache)
    frozen.length = length
    if not length:  # generate() made it for the side network's configuration
        own = TransformersCache(model.backbone).cache.layers
        cache.layers = [*own, *cache.layers[first:]]
    with _attached(model, cache, first), frozen.attached():
        yield


@contextmanager
def _attached(model: QSTModel, cache: Any, first: int, length: int | None = None) -> Iterator[None]:
    """Let torchtune's attentions use a cache's layers from the first on."""
    if cache is None:
        yield
        return
    layers = [_Layer(cache, first + index, length) for index in range(len(attentions(model)))]
    with attached(model, layers):
        yield


class _Layer:
    """One layer of a cache, where torchtune's attention looks for its own."""

    def __init__(self, cache: Cache, index: int, length: int | None) -> None:
        self._cache, self._index, self._length = cache, index, length

    def update(self, k_val: torch.Tensor, v_val: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._cache.update(k_val, v_val, self._index)
        # A static cache also shows what is not filled yet.
        return keys[:, :, : self._length], values[:, :, : self._length]
