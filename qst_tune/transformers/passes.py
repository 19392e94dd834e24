"""A pass of both networks over one cache of transformers, with its masks and positions.

The attentions of the backbone use the first layers of a cache, those of the side network the rest.
B batch, T new tokens, L tokens of the cache and new ones together.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache

from qst_tune.backbone.cache import TransformersCache
from qst_tune.backbone.masks import causal_mask, positions
from qst_tune.backbone.transformers_models import QSTTransformer
from qst_tune.generation.caches import attached, attentions, without_head
from qst_tune.modules.qst_model import QSTModel


def num_cache_layers(model: QSTModel) -> int:
    """Count the layers of a cache for transformers' own model as the backbone; may be on meta."""
    if not isinstance(model, QSTTransformer):
        return 0
    return len(DynamicCache(config=model.backbone.config).layers)


def num_side_layers(model: QSTModel) -> int:
    """Count the other layers of a cache; may be on meta.

    Over transformers' own model one at least: without side blocks it only counts the tokens, which
    not every layer of a backbone does.
    """
    least = 1 if isinstance(model, QSTTransformer) else 0
    return max(least, len(attentions(model)))


def cached_length(model: QSTModel, cache: Cache | None) -> int:
    """Count the tokens in a cache, by the first layer that is not the backbone's."""
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
    L]`` booleans, longer than L for a static cache. ValueError if the mask or the cache is of
    another kind.
    """
    start = cached_length(model, cache)
    if isinstance(model, QSTTransformer):
        _check(model, attention_mask, cache)
        mask = None if attention_mask is None else attention_mask.bool()
        caches = nullcontext() if cache is None else _shared(model, cache, start, tokens)
    else:
        length = start + tokens.shape[1]
        padding = tokens.new_ones(1, length)
        if attention_mask is not None and attention_mask.ndim == 2:
            padding = attention_mask
        if position_ids is None:
            position_ids = positions(padding, tokens.shape[1])
        # Asked in this order: to look into a mask stops a GPU.
        if cache is None and (attention_mask is None or bool((attention_mask == 1).all())):
            mask = None  # torchtune's own causal attention is faster
        else:
            mask = _mask_of(padding if attention_mask is None else attention_mask, tokens, length)
        caches = nullcontext() if cache is None else _attached(model, cache, 0, length)
    with caches, without_head(model):
        y_BTD: torch.Tensor = model(tokens, mask=mask, input_pos=position_ids)
    return y_BTD


def packed_mask(positions_BT: torch.Tensor) -> torch.Tensor | None:
    """Make the mask ``[B, T, T]`` of rows in which a sample begins where positions begin again.

    Booleans, causal inside each sample; None if each row is one sample.
    """
    begins = positions_BT[:, 1:] <= positions_BT[:, :-1]
    if not bool(begins.any()):
        return None
    sample = F.pad(begins.long().cumsum(-1), (1, 0))
    return (sample[:, :, None] == sample[:, None, :]).tril()


def _mask_of(mask: torch.Tensor, tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Torchtune's mask, ``[B, T, L]`` or ``[1, T, L]`` booleans, True: a token may attend.

    Each token attends to itself, also padding: a row without any would give NaN.
    """
    num_new = tokens.shape[1]
    if mask.ndim == 2 and mask.shape[1] == length:
        return causal_mask(mask, num_new)
    if mask.ndim == 3 and mask.dtype == torch.bool:
        return mask
    if mask.ndim == 4 and mask.dtype == torch.bool:
        itself = torch.eye(length, dtype=torch.bool, device=tokens.device)[-num_new:]
        causal = causal_mask(tokens.new_ones(1, length), num_new)
        return (causal & mask[:, 0, :, :length]) | itself
    raise ValueError(
        f"attention_mask of shape {tuple(mask.shape)} and type {mask.dtype} is not supported: give "
        f"[batch, {length}], 0 for padding, or booleans [batch, 1, new tokens, all tokens]"
    )


def _check(model: QSTTransformer, mask: torch.Tensor | None, cache: Cache | None) -> None:
    kind = model.backbone.config.model_type
    if mask is not None and mask.ndim == 4:
        raise ValueError(
            f"attention_mask with 4 dimensions is not supported over {kind}: give [batch, tokens], "
            "0 for padding"
        )
    if cache is not None and not isinstance(cache, DynamicCache):
        raise ValueError(
            f"{type(cache).__name__} is not supported over {kind}: use the default, DynamicCache"
        )


@contextmanager
def _shared(
    model: QSTTransformer, cache: Cache, length: int, tokens: torch.Tensor
) -> Iterator[None]:
    """Let the backbone use a cache's first layers, and the side network the rest."""
    first = num_cache_layers(model)
    frozen = TransformersCache(model.backbone, cache)
    frozen.length = length
    if not length:  # generate() made it for the side network's configuration
        own = TransformersCache(model.backbone).cache.layers
        cache.layers = [*own, *cache.layers[first:]]
    if not attentions(model):
        counted = torch.zeros(len(tokens), 1, tokens.shape[1], 1, device=tokens.device)
        cache.update(counted, counted, first)
    with _attached(model, cache, first), frozen.attached():
        yield


@contextmanager
def _attached(
    model: QSTModel, cache: Cache, first: int, length: int | None = None
) -> Iterator[None]:
    """Let torchtune's attentions use a cache's layers from the first on."""
    own = attentions(model)
    with attached(own, [_Layer(cache, first + index, length) for index in range(len(own))]):
        yield


class _Layer:
    """One layer of a cache, where torchtune's attention looks for its own."""

    def __init__(self, cache: Cache, index: int, length: int | None) -> None:
        self._cache, self._index, self._length = cache, index, length

    def update(self, k_val: torch.Tensor, v_val: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._cache.update(k_val, v_val, self._index)
        # A static cache also shows what is not filled yet.
        return keys[:, :, : self._length], values[:, :, : self._length]
