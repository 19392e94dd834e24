"""The QST model over a decoder of transformers."""

from typing import Any

import torch

from qst_tune.backbone.masks import causal_mask, positions
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.backbone.transformers_model import TransformersModel
from qst_tune.modules.backbone import head_output
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.network import SideNetwork


class QSTTransformer(TransformersModel, QSTModel):
    """Quantized Side Tuning over any decoder that transformers can load.

    The side network's parameters are under ``side.``. The backbone is taken over and frozen;
    ValueError if a side block belongs to a layer that it lacks.
    """

    def __init__(self, backbone: TransformersBackbone, side: SideNetwork) -> None:
        super().__init__()
        self.frozen = backbone
        self.adopt(side)

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Compute fp32 logits ``[B, T, V]``, or what ``head_output`` returns instead.

        ``tokens`` are ``[B, T]``. ``mask`` is padding ``[B, L]``, false where there is some, or
        ``[B, T, L]`` booleans of packed rows, True where a token may attend; None: causal.
        Positions ``[B, T]`` begin again with each packed sample.
        """
        y_BTD, _ = self._both(tokens, mask=mask, input_pos=input_pos)
        return head_output(self, y_BTD)

    def side_where(self, tokens: torch.Tensor, **where: Any) -> dict[str, Any]:
        """Return mask and positions for the side network, with padding as a mask ``[B, T, L]``.

        ``where`` is ``mask`` and ``input_pos`` as the backbone gets them: the side network's layers
        are torchtune's.
        """
        padding, num_new = where.get("mask"), tokens.shape[1]
        cache = self.backbone.cache
        if padding is None and cache is not None:
            length = cache.length + num_new
            padding = torch.ones(len(tokens), length, dtype=torch.bool, device=tokens.device)
        if not isinstance(padding, torch.Tensor) or padding.ndim != 2:
            return super().side_where(tokens, **where)
        input_pos = where.get("input_pos")
        return {
            "mask": causal_mask(padding, num_new),
            "input_pos": positions(padding, num_new) if input_pos is None else input_pos,
        }
