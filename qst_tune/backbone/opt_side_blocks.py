"""Side blocks over OPT are OPT's own layer, as in the authors' code.

LayerNorm, biases everywhere, a ReLU MLP without a gate, and no rotary embedding: positions are in
the hidden states that the side network reads.
"""

from typing import Any

import torch
from torch import nn
from torchtune.modules import FeedForward, MultiHeadAttention, TransformerSelfAttentionLayer

from qst_tune.modules.side.block import SideShape
from qst_tune.torchtune_compat import Mask


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


class ProjectedHead(nn.Module):
    r"""OPT-350M's head: project to the width of its narrow embedding, then score every token.

    .. math:: z = E\,W_{out}\,y

    W_out is ``[W, D]``; E, ``[V, W]``, is the model's LM head; the model owns both. The output mix
    comes before this head, so that f and u have the model's width; the authors' code projects f
    first, and then fails on shapes.
    """

    def __init__(self, project_out: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self._parts = (project_out, linear)  # in a tuple, so that each weight has one name

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Compute logits ``[..., V]`` of ``y``, ``[..., D]``."""
        project_out, linear = self._parts
        logits: torch.Tensor = linear(project_out(y))
        return logits


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
