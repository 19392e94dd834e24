"""A rotary embedding without a table: the side network's, over any backbone."""

import torch
from torch import nn


class TablelessRotary(nn.Module):
    r"""Rotates the channels of a head by angles that grow with the position.

    .. math:: \theta_j(p) = p\,b^{-2j / C}

    where C is the head's width, even, and b the base; channel j rotates with channel j + C / 2.
    Angles are computed from the positions at each call: a table for 131,072 positions would take 16
    MiB, one for Llama 4's 10 million 1.2 GiB.

    Source: RoFormer (https://arxiv.org/abs/2104.09864).
    """

    def __init__(self, dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.dim, self.base = dim, base

    def forward(self, x: torch.Tensor, *, input_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Rotate queries or keys ``[B, T, H, C]``; positions ``[B, T]``, None: from 0."""
        if input_pos is None:
            input_pos = torch.arange(x.shape[1], device=x.device)[None]
        exponents = torch.arange(0, self.dim, 2, device=x.device) / self.dim
        angles = (input_pos[..., None].float() * self.base**-exponents)[:, :, None]
        first, second = x.float().chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return turned.to(x.dtype)
