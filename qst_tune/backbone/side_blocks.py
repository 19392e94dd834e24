"""Side blocks over a transformers backbone: torchtune's own layer; over OPT, that of OPT."""

from typing import Any

from torch import nn
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    TransformerSelfAttentionLayer,
)

from qst_tune.backbone.opt_side_blocks import opt_side_block
from qst_tune.backbone.rotary import TablelessRotary
from qst_tune.modules.side.block import LayerSizes, SideShape

_MLP_NAMES = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
_NORM_EPS = 1e-5


def text_sizes(config: Any) -> LayerSizes:
    """Read the sizes of a text model's layers; an MLP without a size has 4 D."""
    width = config.hidden_size
    # A model without attention (Mamba) leaves the number of heads to us.
    heads = _setting(config, "num_attention_heads") or max(1, width // 64)
    hidden = next((size for name in _MLP_NAMES if (size := _setting(config, name))), None)
    return LayerSizes(
        embed_dim=width,
        hidden_dim=hidden or 4 * width,
        num_heads=heads,
        num_kv_heads=min(_setting(config, "num_key_value_heads") or heads, heads),
        is_rotary=not is_opt(config),
    )


def is_opt(config: Any) -> bool:
    """Return whether a text model is an OPT, of which the authors have code of its own."""
    return bool(config.model_type == "opt")


def side_block(config: Any, shape: SideShape) -> TransformerSelfAttentionLayer:
    """Build a side block of width ``shape.embed_dim`` with random weights."""
    if is_opt(config):
        return opt_side_block(shape, post_norm=not config.do_layer_norm_before)
    return _plain_side_block(shape, _rope_base(config))


def side_norm(config: Any, dim: int) -> nn.Module:
    """Build the side network's final norm: RMSNorm; LayerNorm over OPT, none over OPT-350M."""
    norm: nn.Module = RMSNorm(dim, eps=_NORM_EPS)
    if is_opt(config):
        norm = nn.LayerNorm(dim) if config.do_layer_norm_before else nn.Identity()
    return norm


def _setting(config: Any, name: str) -> Any:
    """A setting; the largest where layers have different ones (Gemma 4's larger models)."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers': it differs between layers
        value = [getattr(layer, name) for layer in config.per_layer_config]
    return max(value) if isinstance(value, list | tuple) else value


def _plain_side_block(shape: SideShape, base: float) -> TransformerSelfAttentionLayer:
    """Build a pre-norm layer of RMSNorm, rotary attention and a gated MLP, without biases.

    Its weights are random; ``base`` is that of the rotary embedding.
    """
    dim, kv_dim = shape.embed_dim, shape.num_kv_heads * shape.head_dim
    return TransformerSelfAttentionLayer(
        attn=MultiHeadAttention(
            embed_dim=dim,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            q_proj=nn.Linear(dim, dim, bias=False),
            k_proj=nn.Linear(dim, kv_dim, bias=False),
            v_proj=nn.Linear(dim, kv_dim, bias=False),
            output_proj=nn.Linear(dim, dim, bias=False),
            pos_embeddings=TablelessRotary(shape.head_dim, base),
        ),
        mlp=FeedForward(
            gate_proj=nn.Linear(dim, shape.hidden_dim, bias=False),
            down_proj=nn.Linear(shape.hidden_dim, dim, bias=False),
            up_proj=nn.Linear(dim, shape.hidden_dim, bias=False),
        ),
        sa_norm=RMSNorm(dim, eps=_NORM_EPS),
        mlp_norm=RMSNorm(dim, eps=_NORM_EPS),
    )


def _rope_base(config: Any) -> float:
    """Return the base of the model's rotary embedding, or 10,000 where it has none or several."""
    parameters = getattr(config, "rope_parameters", None) or {}
    base = parameters.get("rope_theta") or getattr(config, "rope_theta", None)
    return float(base) if isinstance(base, int | float) else 10_000.0
