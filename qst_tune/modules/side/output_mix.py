"""Output mixes: how the side network's last state joins the backbone's before the LM head.

In all of them f is the backbone's last hidden state after its final norm and u the upsampled side
state, both ``[B, T, D]``.
"""

from typing import Literal

import torch
from torch import nn

OutputMixKind = Literal["residual", "alpha", "sigmoid", "swapped_sigmoid"]


class ResidualMix(nn.Module):
    """Add the side network to the backbone: :math:`y = f + u`. Not in the paper.

    With an upsampler that starts at zero the model starts exactly at the backbone, and the
    upsampler has a gradient from the first step. Under the paper's mix it has none while alpha
    is 1.
    """

    def forward(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Mix."""
        return f + u


class AlphaMix(nn.Module):
    r"""The paper's mix: :math:`y = \alpha f + (1 - \alpha)\,u`, which starts at the backbone.

    Source: QST (https://arxiv.org/abs/2401.07159), where alpha is one number that starts at 1.
    """

    def __init__(self, num_channels: int, initial_alpha: float = 1.0) -> None:
        super().__init__()
        self.initial_alpha = float(initial_alpha)
        self.alpha = nn.Parameter(torch.empty(num_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set alpha to its start."""
        nn.init.constant_(self.alpha, self.initial_alpha)

    def forward(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Mix."""
        alpha = self.alpha.to(f.dtype)
        return alpha * f + (1 - alpha) * u


class SigmoidMix(nn.Module):
    r"""The authors' code: :math:`y = \sigma(z)\,f + (1 - \sigma(z))\,u`, z from 1.

    Their code for OPT has f and u ``swapped``. It starts at 0.731 of the backbone plus 0.269 of a
    random state (swapped: the other way round), and exists to load and continue their checkpoints,
    which have one z a channel.
    """

    def __init__(
        self, num_channels: int, initial_logit: float = 1.0, *, swapped: bool = False
    ) -> None:
        super().__init__()
        self.initial_logit = float(initial_logit)
        self.swapped = swapped
        self.logit = nn.Parameter(torch.empty(num_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the logit to its start."""
        nn.init.constant_(self.logit, self.initial_logit)

    def forward(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Mix."""
        weight = torch.sigmoid(self.logit).to(f.dtype)
        return torch.lerp(f, u, weight) if self.swapped else torch.lerp(u, f, weight)


def build_output_mix(kind: OutputMixKind, num_channels: int, initial: float = 1.0) -> nn.Module:
    """Build an output mix with ``num_channels`` (1 or D) weights that start at ``initial``."""
    if kind == "residual":
        return ResidualMix()
    if kind == "alpha":
        return AlphaMix(num_channels, initial)
    return SigmoidMix(num_channels, initial, swapped=kind == "swapped_sigmoid")
