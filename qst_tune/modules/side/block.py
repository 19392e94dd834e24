"""Side blocks: the backbone's own layer type, rebuilt at the width of the side network."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torchtune.modules import FeedForward, MultiHeadAttention, TransformerSelfAttentionLayer

MIN_HEAD_DIM = 4

# Arguments besides ``dim`` of torchtune's rotary embeddings, plain and scaled.
_ROPE_SETTINGS = (
    "max_seq_len",
    "base",
    "scale_factor",
    "low_freq_factor",
    "high_freq_factor",
    "old_context_len",
)


@dataclass(frozen=True)
class SideShape:
    """Sizes of a side block: S, width inside its MLP, query heads, key and value heads."""

    embed_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.embed_dim // self.num_heads


@dataclass(frozen=True)
class LayerSizes(SideShape):
    """Sizes of a backbone layer; where rotary, a side block has heads of even width."""

    is_rotary: bool


def layer_sizes(layer: TransformerSelfAttentionLayer) -> LayerSizes:
    """Read the sizes of a torchtune layer."""
    attn = layer.attn
    return LayerSizes(
        embed_dim=attn.embed_dim,
        hidden_dim=layer.mlp.w1.out_features,
        num_heads=attn.num_heads,
        num_kv_heads=attn.num_kv_heads,
        is_rotary=attn.pos_embeddings is not None,
    )


def side_shape(
    sizes: LayerSizes, reduction_factor: int, min_head_dim: int = MIN_HEAD_DIM
) -> SideShape:
    """Choose the sizes of a side block from those of a backbone layer and r.

    Widths are the backbone's divided by r, rounded down. The side network keeps the backbone's
    number of heads, as the authors do, where that leaves a head_dim of at least ``min_head_dim``
    (never below 4), even where rotary embeddings turn pairs of channels. Otherwise it has the
    largest smaller number that does, preferably one that keeps the backbone's share of key and
    value heads. Narrow heads learn badly and many heads are slow (docs/results.md).

    ValueError if no number of heads fits that width; the message names values of r that work.
    """
    embed_dim = sizes.embed_dim // reduction_factor if reduction_factor >= 1 else 0
    num_heads = _num_side_heads(sizes, embed_dim, min(min_head_dim, embed_dim))
    if num_heads is None:
        raise ValueError(
            f"reduction_factor={reduction_factor} gives a side network of width {embed_dim} for a "
            f"backbone of width {sizes.embed_dim}, which cannot be split into heads of "
            f"{'an even' if sizes.is_rotary else 'a'} width of at least "
            f"{MIN_HEAD_DIM}; values that work: {_working_factors(sizes)}"
        )
    return SideShape(
        embed_dim=embed_dim,
        hidden_dim=max(1, sizes.hidden_dim // reduction_factor),
        num_heads=num_heads,
        num_kv_heads=_num_side_kv_heads(num_heads, sizes.num_heads, sizes.num_kv_heads),
    )


def build_side_blocks(layers: Iterable[nn.Module], shape: SideShape) -> nn.ModuleList:
    """Build side blocks with random weights, one for each given layer and of its own type.

    A block imitates norm type and epsilon, biases, activation, rotary base and scaling, and
    attention dropout. Blocks share a rotary embedding where their layers do: its cache can be
    megabytes. ValueError if a layer is not torchtune's ``TransformerSelfAttentionLayer``.
    """
    side_ropes: dict[nn.Module, nn.Module | None] = {}
    blocks = nn.ModuleList()
    for layer in layers:
        if not isinstance(layer, TransformerSelfAttentionLayer):
            raise ValueError(
                f"a backbone layer of type {type(layer).__name__} has no side block; supported: "
                "torchtune's TransformerSelfAttentionLayer"
            )
        rope = layer.attn.pos_embeddings
        if rope not in side_ropes:
            side_ropes[rope] = _side_rope(rope, shape.head_dim)
        blocks.append(_side_block(layer, shape, side_ropes[rope]))
    return blocks


def _side_block(
    layer: TransformerSelfAttentionLayer, shape: SideShape, rope: nn.Module | None
) -> TransformerSelfAttentionLayer:
    return type(layer)(  # a family's own subclass, such as one with post-norm
        attn=_side_attention(layer.attn, shape, rope),
        mlp=_side_mlp(layer.mlp, shape),
        sa_norm=resize_norm(layer.sa_norm, shape.embed_dim),
        mlp_norm=resize_norm(layer.mlp_norm, shape.embed_dim),
        sa_scale=resize_norm(layer.sa_scale, shape.embed_dim),
        mlp_scale=resize_norm(layer.mlp_scale, shape.embed_dim),
    )


def resize_norm(norm: nn.Module, dim: int) -> nn.Module:
    """Build a fresh norm of the same type and epsilon over ``dim`` channels.

    ValueError if its type is not built from ``dim`` and ``eps`` (Gemma 2's, for example).
    """
    if isinstance(norm, nn.Identity):
        return nn.Identity()  # not the backbone's: two networks must not share a module
    if not hasattr(norm, "eps"):
        raise ValueError(f"a backbone with a {type(norm).__name__} has no side network yet")
    return type(norm)(dim, eps=norm.eps)


def _side_attention(
    attn: MultiHeadAttention, shape: SideShape, rope: nn.Module | None
) -> MultiHeadAttention:
    query_dim = shape.num_heads * shape.head_dim
    kv_dim = shape.num_kv_heads * shape.head_dim
    # A family's own subclass, such as one that norms before it turns; Gemma 2's is not one.
    attention_type = type(attn) if isinstance(attn, MultiHeadAttention) else MultiHeadAttention
    return attention_type(
        embed_dim=shape.embed_dim,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        q_proj=_linear_like(attn.q_proj, shape.embed_dim, query_dim),
        k_proj=_linear_like(attn.k_proj, shape.embed_dim, kv_dim),
        v_proj=_linear_like(attn.v_proj, shape.embed_dim, kv_dim),
        output_proj=_linear_like(attn.output_proj, query_dim, shape.embed_dim),
        pos_embeddings=rope,
        q_norm=attn.q_norm and resize_norm(attn.q_norm, shape.head_dim),
        k_norm=attn.k_norm and resize_norm(attn.k_norm, shape.head_dim),
        max_seq_len=attn.max_seq_len,
        is_causal=attn.is_causal,
        attn_dropout=attn.attn_dropout,
    )


def _side_mlp(mlp: FeedForward, shape: SideShape) -> FeedForward:
    up_proj = mlp.w3 and _linear_like(mlp.w3, shape.embed_dim, shape.hidden_dim)
    return type(mlp)(
        gate_proj=_linear_like(mlp.w1, shape.embed_dim, shape.hidden_dim),
        down_proj=_linear_like(mlp.w2, shape.hidden_dim, shape.embed_dim),
        up_proj=up_proj,
        activation=copy.deepcopy(mlp.activation),
    )


def _linear_like(linear: nn.Linear, in_dim: int, out_dim: int) -> nn.Linear:
    return nn.Linear(in_dim, out_dim, bias=linear.bias is not None)


def _side_rope(rope: nn.Module | None, head_dim: int) -> nn.Module | None:
    """A rotary embedding of the same type and settings for another head_dim."""
    if rope is None:
        return None
    settings = {name: getattr(rope, name) for name in _ROPE_SETTINGS if hasattr(rope, name)}
    return type(rope)(dim=head_dim, **settings)


def _num_side_heads(
    sizes: LayerSizes, embed_dim: int, min_head_dim: int = MIN_HEAD_DIM
) -> int | None:
    """The largest fitting number of heads; first among those that keep the share of kv heads."""
    fitting = [
        heads
        for heads in range(sizes.num_heads, 0, -1)
        if embed_dim % heads == 0
        and (not sizes.is_rotary or (embed_dim // heads) % 2 == 0)
        and embed_dim // heads >= max(min_head_dim, MIN_HEAD_DIM)
    ]
    exact = [heads for heads in fitting if heads * sizes.num_kv_heads % sizes.num_heads == 0]
    return next(iter(exact or fitting), None)


def _num_side_kv_heads(side_heads: int, num_heads: int, num_kv_heads: int) -> int:
    """The largest divisor of ``side_heads`` not above the backbone's share of key-value heads."""
    wanted = max(1, side_heads * num_kv_heads // num_heads)
    return next(n for n in range(wanted, 0, -1) if side_heads % n == 0)


def _working_factors(sizes: LayerSizes) -> str:
    factors = [r for r in (2, 4, 8, 12, 16, 24, 32, 48, 64) if r <= sizes.embed_dim]
    fits = [str(r) for r in factors if _num_side_heads(sizes, sizes.embed_dim // r)]
    return ", ".join(fits) or "none (the backbone is too narrow)"
