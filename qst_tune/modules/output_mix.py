"""Output mixes: how the side network's last state joins the backbone's before the LM head.

In all of them f is the backbone's last hidden state after its final norm and u the upsampled side
state, both ``[B, T, D]``.
"""

from typing import Literal, get_args

import torch
from torch import nn

OutputMixKind = Literal["residual", "alpha", "sigmoid"]


class ResidualMix(nn.Module):
    r"""Add the side network to the backbone: :math:`y = f + u`.

    With an upsampler that starts at zero the model starts exactly at the backbone, and the
    upsampler has a gradient from the first step. Under the paper's mix it has none while alpha
    is 1. No parameters. Not in the paper.
    """

    def forward(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Mix.

        Args:
            f (torch.Tensor): ``[B, T, D]``.
            u (torch.Tensor): ``[B, T, D]``.

        Returns:
            torch.Tensor: ``[B, T, D]``.
        """
        return f + u


class AlphaMix(nn.Module):
    r"""The paper's mix: :math:`y = \alpha f + (1 - \alpha)\,u` with alpha learned from 1.

    Source: QST (https://arxiv.org/abs/2401.07159). It starts exactly at the backbone.

    Args:
        num_channels (int): 1 for a scalar alpha (paper), D for one per channel.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(num_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set alpha to 1: only the backbone."""
        nn.init.ones_(self.alpha)

    def forward(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Mix.

        Args:
            f (torch.Tensor): ``[B, T, D]``.
            u (torch.Tensor): ``[B, T, D]``.

        Returns:
            torch.Tensor: ``[B, T, D]``.
        """
        alpha = self.alpha.to(f.dtype)
        return alpha * f + (1 - alpha) * u


class SigmoidMix(nn.Module):
    r"""The authors' code: :math:`y = \sigma(z)\,f + (1 - \sigma(z))\,u`, z from 1.

    It does not start at the backbone but at 0.731 of it plus 0.269 of a random state; kept to load
    and continue their checkpoints.

    Args:
        num_channels (int): 1, or D as in the authors' code.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.empty(num_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the logit to 1, as the authors do."""
        nn.init.ones_(self.logit)

    def forward(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Mix.

        Args:
            f (torch.Tensor): ``[B, T, D]``.
            u (torch.Tensor): ``[B, T, D]``.

        Returns:
            torch.Tensor: ``[B, T, D]``.
        """
        weight = torch.sigmoid(self.logit).to(f.dtype)
        return torch.lerp(u, f, weight)


def build_output_mix(kind: OutputMixKind, num_channels: int) -> nn.Module:
    """Build an output mix.

    Args:
        kind (OutputMixKind): which one.
        num_channels (int): 1 or D; "residual" has no parameters and ignores it.

    Returns:
        nn.Module: called with f and u.

    Raises:
        ValueError: if ``kind`` is unknown.
    """
    if kind not in get_args(OutputMixKind):
        known = ", ".join(get_args(OutputMixKind))
        raise ValueError(f"output_mix={kind!r} is unknown; choose one of {known}")
    if kind == "residual":
        return ResidualMix()
    return AlphaMix(num_channels) if kind == "alpha" else SigmoidMix(num_channels)
