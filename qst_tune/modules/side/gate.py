"""The gate of QST: how much of the carried side state a block takes over."""

import torch
from torch import nn


class Gate(nn.Module):
    r"""Learned interpolation between a new and a carried state.

    .. math:: \mathrm{gate}(x, c) = (1 - \beta)\,x + \beta\,c, \qquad \beta = \sigma(\gamma)

    Source: QST (https://arxiv.org/abs/2401.07159), where gamma is a scalar that starts at 0; the
    authors' code has one gamma per channel that starts at 0.5.
    """

    def __init__(self, num_channels: int, initial_gamma: float) -> None:
        super().__init__()
        self.initial_gamma = float(initial_gamma)
        self.gamma = nn.Parameter(torch.empty(num_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gamma to its start."""
        nn.init.constant_(self.gamma, self.initial_gamma)

    def forward(self, new: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
        """Mix two states ``[B, T, S]``, x and c, in the dtype of x."""
        beta = torch.sigmoid(self.gamma).to(new.dtype)
        return torch.lerp(new, carried.to(new.dtype), beta)
