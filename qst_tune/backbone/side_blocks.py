"""Side blocks over a transformers backbone: torchtune's own layer; over OPT, that of OPT."""

from typing import Any

import torch
from torch import nn
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    TransformerSelfAttentionLayer,
)

from qst_tune.modules.side.block import LayerSizes, SideShape
from qst_tune.torchtune_compat import Mask


class TablelessRotary(nn.Module):
    r"""Rotates the channels of a head by angles that grow with the position.

    .. math:: \theta_j(p) = p\,b^{-2j / C}

    where C is the head's width, even, and b the base; channel j rotates with channel j + C / 2.
    Angles are computed from the positions at each call: a table for 131,072 positions would take 16
    MiB, one for Llama 4's 10 million 1.2 GiB.

    Source: RoFormer (https://arxiv.org/abs/2104.09864).
    """

    def __init__(self, dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.dim, self.base = dim, base

    def forward(self, x: torch.Tensor, *, input_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Rotate queries or keys ``[B, T, H, C]``; positions ``[B, T]``, None: from 0."""
        if input_pos is None:
            input_pos = torch.arange(x.shape[1], device=x.device)[None]
        exponents = torch.arange(0, self.dim, 2, device=x.device) / self.dim
        angles = (input_pos[..., None].float() * self.base**-exponents)[:, :, None]
        first, second = x.float().chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return turned.to(x.dtype)


class PostNormLayer(TransformerSelfAttentionLayer):
    r"""torchtune's layer with the norms moved behind the residual sums, as OPT-350M has them.

    .. math::
        h = \mathrm{norm}_1(x + \mathrm{attn}(x)), \qquad y = \mathrm{norm}_2(h + \mathrm{mlp}(h))

    where :math:`\mathrm{norm}_1` is ``sa_norm`` and :math:`\mathrm{norm}_2` is ``mlp_norm``.
    """

    def forward(
        self,
        x: torch.Tensor,
        *,
        mask: Mask | None = None,
        input_pos: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Apply the layer to ``x``, ``[B, T, D]``; arguments as in torchtune's layer."""
        h_BTD = self.sa_norm(x + self.attn(x, x, mask=mask, input_pos=input_pos))
        y_BTD: torch.Tensor = self.mlp_norm(h_BTD + self.mlp(h_BTD))
        return y_BTD


def opt_side_block(shape: SideShape, *, post_norm: bool) -> TransformerSelfAttentionLayer:
    """Build one of OPT's layers with random weights; ``post_norm``: norms after the sums."""
    dim = shape.embed_dim
    q_proj, k_proj, v_proj, output_proj = (nn.Linear(dim, dim) for _ in range(4))
    layer_type = PostNormLayer if post_norm else TransformerSelfAttentionLayer
    return layer_type(
        attn=MultiHeadAttention(
            embed_dim=dim,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_heads,
            head_dim=shape.head_dim,
            q_proj=q_proj,
            k_proj=k_proj,
            v_proj=v_proj,
            output_proj=output_proj,
        ),
        mlp=FeedForward(
            gate_proj=nn.Linear(dim, shape.hidden_dim),
            down_proj=nn.Linear(shape.hidden_dim, dim),
            activation=nn.ReLU(),
        ),
        sa_norm=nn.LayerNorm(dim),
        mlp_norm=nn.LayerNorm(dim),
    )


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
    """Build a pre-norm layer of RMSNorm, rotary attention and a gated MLP, without biases."""
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
