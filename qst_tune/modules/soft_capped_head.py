"""An LM head tied to the embedding whose logits are softly capped, as Gemma 2 has it."""

import torch
from torch import nn
from torchtune.modules import TiedLinear


class SoftCappedHead(nn.Module):
    r"""Score every token with the embedding, and keep the scores below a cap.

    .. math:: z = c\,\tanh(E\,y / c)

    where E is the embedding's table ``[V, D]`` and c the cap.

    Source: Gemma 2 (https://arxiv.org/abs/2408.00118, section 2) as in transformers'
    ``modeling_gemma2.py``. torchtune 0.6.1 caps y instead (``Gemma2FinalNorm``).

    Args:
        embedding (nn.Embedding): the tied embedding; not owned, so it stands in a state dict once.
        cap (float): c.
    """

    def __init__(self, embedding: nn.Embedding, cap: float) -> None:
        super().__init__()
        self.tied = TiedLinear(embedding)
        self.cap = cap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits.

        Args:
            x (torch.Tensor): y, ``[..., D]``.

        Returns:
            torch.Tensor: ``[..., V]``.
        """
        return torch.tanh(self.tied(x) / self.cap) * self.cap
