"""The PEQA model over a torchtune decoder."""

from typing import Any

import torch
from torchtune.modules import TransformerDecoder

from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.modules.torchtune_backbone import decoder_parts


class PEQADecoder(PEQAModel, TransformerDecoder):
    """A torchtune decoder whose linears are :class:`~qst_tune.modules.peqa_linear.PEQALinear`.

    It computes what the backbone's decoder does and keeps its names; its modules are taken over,
    not copied. ValueError if it has no integer linear.
    """

    norm: Any

    def __init__(self, backbone: TransformerDecoder) -> None:
        TransformerDecoder.__init__(self, **decoder_parts(backbone))
        self.adopt()

    def unembed(self, h: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Turn the last hidden state, ``[B, T, D]``, into logits or the head's input."""
        if self.skip_output_layer:
            head_input: torch.Tensor = self.norm(h)
            return head_input
        output: torch.Tensor | list[torch.Tensor] = super().unembed(h)
        return output
