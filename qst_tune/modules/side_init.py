r"""Side blocks that start as the backbone's own layers, cut to the side network's size.

A side block is its backbone layer with fewer channels, heads, channels a head and MLP channels. Of
every weight the rows and columns of those that stay are copied, so each block starts as the layer
would be after structured pruning:

- "slice" keeps the first of each kind;
- "prune" keeps those with the largest weights, as LST does
  (https://arxiv.org/abs/2206.06522, section 3.3): an MLP channel j counts
  :math:`\sum_c |W^{gate}_{jc}|\,|W^{up}_{jc}|\,|W^{down}_{cj}|`, channel d of a head
  :math:`\sum_c |W^V_{dc}|\,|W^O_{cd}|`, a head the sum over its channels, and a channel of the
  residual stream (one choice for all layers) the sum of all weights that write to it. LST takes the
  embedding for the last, which may be narrower than the layers.

Queries and keys are cut otherwise in both: their channels turn with the position, pair by pair, so
the pairs are taken evenly spaced. Where the side head_dim divides the backbone's, each then turns
exactly as fast in the side network as in the backbone.

Weights are taken as the backbone computes with them: decoded to its dtype, if it is quantised.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torchtune.models.phi3._position_embeddings import Phi3RotaryPositionalEmbeddings
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings

from qst_tune.modules.base_quantization import weight_of
from qst_tune.modules.stretched_rope import StretchedRoPE
from qst_tune.modules.whole_weights import whole_weights

SideInit = Literal["random", "slice", "prune"]

_HALF_SPLIT_ROPES = (
    Phi3RotaryPositionalEmbeddings,
    Qwen2RotaryPositionalEmbeddings,
    StretchedRoPE,
)


@torch.no_grad()
def initialize_from_backbone(side: Any, backbone: Any, side_init: SideInit) -> None:
    """Cut the side blocks and the side norm, in place, out of a backbone with weights.

    Args:
        side (Any): a ``SideNetwork``; each block is cut out of the layer beside it.
        backbone (Any): a ``TransformerDecoder``, quantised or not.
        side_init (SideInit): "slice" or "prune".
    """
    # The embedding's dtype: norms are kept in fp32, and integer weights do not say in which dtype
    # they are decoded. Not fp32, where the copy of one weight may be gigabytes.
    dtype = backbone.tok_embeddings.weight.dtype
    prune = side_init == "prune"
    channels = _kept(_written(backbone.layers, prune, dtype), side.blocks[0].attn.embed_dim)
    cut = _Cut(channels, prune, dtype)
    for block, index in zip(side.blocks, side.layers, strict=True):
        layer = backbone.layers[index]
        with whole_weights(layer):
            _cut_attention(block.attn, layer.attn, cut)
            _cut_mlp(block.mlp, layer.mlp, cut)
            for name in ("sa_norm", "mlp_norm", "sa_scale", "mlp_scale"):
                _cut_vectors(getattr(block, name), getattr(layer, name), channels)
    with whole_weights(backbone):
        _cut_vectors(side.norm, backbone.norm, channels)


@dataclass(frozen=True)
class _Cut:
    """What is the same for all layers.

    channels: ``[S]``, those of the residual stream that stay; prune: keep the largest of every
    other kind, not the first; dtype: that weights are decoded to.
    """

    channels: torch.Tensor
    prune: bool
    dtype: torch.dtype


def _kept(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` largest along the last dimension, in ascending order."""
    return importance.topk(count).indices.sort().values


def _first(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """An importance that falls from left to right: the first are kept."""
    return -torch.arange(shape[-1], device=device).float().expand(shape)


def _written(layers: Any, prune: bool, dtype: torch.dtype) -> torch.Tensor:
    """``[D]``: importance of each channel of the residual stream."""
    first = layers[0].attn.output_proj
    with whole_weights(layers[0]):
        device = weight_of(first, dtype).device
    if not prune:
        return _first((first.out_features,), device)
    total = torch.zeros((first.out_features,), device=device)
    for layer in layers:
        with whole_weights(layer):
            for linear in (layer.attn.output_proj, layer.mlp.w2):
                total += weight_of(linear, dtype).abs().sum(1, dtype=torch.float32)
    return total


def _cut_mlp(mlp: Any, source: Any, cut: _Cut) -> None:
    inner = _kept(_inner_importance(source, cut), mlp.w1.out_features)
    _cut_linear(mlp.w1, source.w1, inner, cut.channels, cut.dtype)
    _cut_linear(mlp.w2, source.w2, cut.channels, inner, cut.dtype)
    if source.w3 is not None:
        _cut_linear(mlp.w3, source.w3, inner, cut.channels, cut.dtype)


def _inner_importance(source: Any, cut: _Cut) -> torch.Tensor:
    """``[MLP channels]``."""
    if not cut.prune:
        return _first((source.w1.out_features,), cut.channels.device)
    gate = weight_of(source.w1, cut.dtype)[:, cut.channels].abs().float()
    importance = gate * weight_of(source.w2, cut.dtype)[cut.channels].T.abs()
    if source.w3 is not None:
        importance = importance * weight_of(source.w3, cut.dtype)[:, cut.channels].abs()
    return importance.sum(1)


def _cut_attention(attn: Any, source: Any, cut: _Cut) -> None:
    heads = _choose_heads(attn, source, _value_importance(source, cut))
    turned = _turned_channels(source, attn.head_dim).to(cut.channels.device)
    dim = source.head_dim
    queries = heads.query[:, None] * dim + turned
    keys = heads.kv[:, None] * dim + turned
    values = heads.kv[:, None] * dim + heads.value_channels
    written = heads.query[:, None] * dim + heads.value_channels[heads.kv_of_query]
    _cut_linear(attn.q_proj, source.q_proj, queries.flatten(), cut.channels, cut.dtype)
    _cut_linear(attn.k_proj, source.k_proj, keys.flatten(), cut.channels, cut.dtype)
    _cut_linear(attn.v_proj, source.v_proj, values.flatten(), cut.channels, cut.dtype)
    _cut_linear(attn.output_proj, source.output_proj, cut.channels, written.flatten(), cut.dtype)
    _cut_vectors(attn.q_norm, source.q_norm, turned)
    _cut_vectors(attn.k_norm, source.k_norm, turned)


def _value_importance(source: Any, cut: _Cut) -> torch.Tensor:
    """``[num_heads, head_dim]``: how much each channel of each query head passes on."""
    heads, kv_heads, dim = source.num_heads, source.num_kv_heads, source.head_dim
    if not cut.prune:
        # Heads fall faster than the channels within one.
        return _first((heads * dim,), cut.channels.device).view(heads, dim)
    v_weight, o_weight = (weight_of(m, cut.dtype) for m in (source.v_proj, source.output_proj))
    value = v_weight[:, cut.channels].abs().float().view(kv_heads, dim, -1)
    output = o_weight[cut.channels].abs().float().view(-1, heads, dim)
    value = value.repeat_interleave(heads // kv_heads, dim=0)
    importance: torch.Tensor = torch.einsum("hdc,chd->hd", value, output)
    return importance


@dataclass(frozen=True)
class _Heads:
    """Which heads and channels of a backbone's attention a side block keeps.

    query: ``[Q]`` heads; kv: ``[K]`` heads; kv_of_query: ``[Q]``, indices into kv;
    value_channels: ``[K, side head_dim]``.
    """

    query: torch.Tensor
    kv: torch.Tensor
    kv_of_query: torch.Tensor
    value_channels: torch.Tensor


def _choose_heads(attn: Any, source: Any, importance: torch.Tensor) -> _Heads:
    """The best key-value heads, each with the best query heads that use it, then others.

    There is room for others only where the side network has fewer key-value heads than its share.
    Query heads stand in the order of the key-value heads that they use, as attention pairs them.
    """
    per_kv, per_side = (a.num_heads // a.num_kv_heads for a in (source, attn))
    grouped = importance.view(source.num_kv_heads, per_kv, -1).sum(1)
    kv = _kept(grouped.sum(1), attn.num_kv_heads)
    per_head = importance.sum(1)
    own = kv[:, None] * per_kv + _kept(per_head.view(-1, per_kv)[kv], min(per_kv, per_side))
    left = per_head.index_fill(0, own.flatten(), -torch.inf)
    others = _kept(left, attn.num_heads - own.numel()).view(len(kv), per_side - own.shape[1])
    return _Heads(
        query=torch.cat([own, others], dim=1).sort(dim=1).values.flatten(),
        kv=kv,
        kv_of_query=torch.arange(len(kv), device=kv.device).repeat_interleave(per_side),
        value_channels=_kept(grouped[kv], attn.head_dim),
    )


def _turned_channels(source: Any, head_dim: int) -> torch.Tensor:
    """``[head_dim]`` channels of a query or key head, evenly spaced, rotary pairs kept together."""
    if source.pos_embeddings is None:
        return torch.arange(head_dim) * int(source.head_dim) // head_dim
    turning = int(source.pos_embeddings.dim)  # of a head's channels, the first
    pairs = torch.arange(head_dim // 2) * turning // head_dim
    if isinstance(source.pos_embeddings, _HALF_SPLIT_ROPES):
        return torch.cat([pairs, pairs + turning // 2])
    return torch.stack([2 * pairs, 2 * pairs + 1], dim=1).flatten()


def _cut_linear(
    target: Any, source: Any, rows: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype
) -> None:
    target.weight.copy_(weight_of(source, dtype)[rows][:, columns])
    if target.bias is not None:
        target.bias.copy_(source.bias[rows])


def _cut_vectors(target: nn.Module | None, source: nn.Module | None, kept: torch.Tensor) -> None:
    """Cut the weights of a norm."""
    if target is None or source is None:
        return
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        ours.copy_(theirs[kept])
