"""The QST model over a decoder of transformers."""

from typing import Any

import torch

from qst_tune.backbone.masks import causal_mask, positions
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.backbone.transformers_model import TransformersModel
from qst_tune.modules.backbone import head_output
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side_network import SideNetwork


class QSTTransformer(TransformersModel, QSTModel):
    """Quantized Side Tuning over any decoder that transformers can load.

    The side network's parameters are under ``side.``.

    Args:
        backbone (TransformersBackbone): taken over and frozen.
        side (SideNetwork): its blocks belong to layers of the backbone.

    Raises:
        ValueError: if a side block belongs to a layer that is not there.
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
        """Compute logits.

        Args:
            tokens (torch.Tensor): ``[B, T]`` token ids.
            mask (torch.Tensor | None): ``[B, L]`` padding, false where there is some; or
                ``[B, T, L]`` booleans of packed rows, True where a token may attend; None: causal.
            input_pos (torch.Tensor | None): ``[B, T]`` positions; those of a packed row begin again
                with each sample.

        Returns:
            torch.Tensor | list[torch.Tensor]: fp32 logits ``[B, T, V]``; chunks of logits after
            ``set_num_output_chunks``; the head's input ``[B, T, D]`` if ``skip_output_layer``.
        """
        y_BTD, _ = self._both(tokens, mask=mask, input_pos=input_pos)
        return head_output(self, y_BTD)

    def side_where(self, tokens: torch.Tensor, **where: Any) -> dict[str, Any]:
        """Return mask and positions for the side network, whose layers are torchtune's.

        Args:
            tokens (torch.Tensor): ``[B, T]``.
            **where (Any): ``mask`` and ``input_pos`` as the backbone gets them.

        Returns:
            dict[str, Any]: the same, with padding as a mask ``[B, T, L]``.
        """
        padding, num_new = where.get("mask"), tokens.shape[1]
        cache = self.backbone.cache
        if padding is None and cache is not None:
            length = cache.length + num_new
            padding = torch.ones(len(tokens), length, dtype=torch.bool, device=tokens.device)
        if not isinstance(padding, torch.Tensor) or padding.ndim != 2:
            return where
        input_pos = where.get("input_pos")
        return {
            "mask": causal_mask(padding, num_new),
            "input_pos": positions(padding, num_new) if input_pos is None else input_pos,
        }
