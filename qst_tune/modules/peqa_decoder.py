"""The PEQA model over a torchtune decoder."""

from typing import Any

import torch
from torchtune.modules import TransformerDecoder

from qst_tune.modules.decoder_parts import decoder_parts
from qst_tune.modules.peqa_model import PEQAModel


class PEQADecoder(PEQAModel, TransformerDecoder):
    """A torchtune decoder whose linears are :class:`~qst_tune.modules.peqa_linear.PEQALinear`.

    It computes what the backbone's decoder does and keeps its names. Beyond that it can leave out
    the LM head for a loss that applies the head itself.

    Args:
        backbone (TransformerDecoder): with integer linears; its modules are taken over, not copied,
            and frozen except for the scales.

    Raises:
        ValueError: if it has no integer linear.
    """

    norm: Any

    def __init__(self, backbone: TransformerDecoder) -> None:
        TransformerDecoder.__init__(self, **decoder_parts(backbone))
        self.adopt()

    def unembed(self, h: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Turn the last hidden state into logits, or into the LM head's input.

        Args:
            h (torch.Tensor): ``[B, T, D]``.

        Returns:
            torch.Tensor | list[torch.Tensor]: as torchtune's decoder; the head's input
            ``[B, T, D]`` if ``skip_output_layer``.
        """
        if self.skip_output_layer:
            head_input: torch.Tensor = self.norm(h)
            return head_input
        output: torch.Tensor | list[torch.Tensor] = super().unembed(h)
        return output
