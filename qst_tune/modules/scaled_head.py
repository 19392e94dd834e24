"""A language model's head that scales or caps its logits."""

import torch
from torch import nn


class ScaledHead(nn.Module):
    r"""Logits with a scale s and a soft cap c behind the matrix product.

    .. math:: z = c\,\tanh(s\,W y / c)

    The model owns W, its own head; c may be None.
    """

    def __init__(self, linear: nn.Module, scale: float, cap: float | None) -> None:
        super().__init__()
        self._linear = (linear,)  # in a tuple, so that its weight has one name
        self.scale, self.cap = scale, cap

    @property
    def linear(self) -> nn.Module:
        """W as a module."""
        return self._linear[0]

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Compute logits ``[..., V]`` of ``y``, ``[..., D]``."""
        logits: torch.Tensor = self.linear(y)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap
