r"""Downsamplers: they bring a hidden state of the backbone to the width of the side network.

The five of QST (https://arxiv.org/abs/2401.07159, section 3.2); D is the backbone's width,
S = D / r the side network's, R the rank:

=========  ==================================  =================  ==========================
kind       equation                            parameters         kept for its gradient
=========  ==================================  =================  ==========================
linear     :math:`W h`                         D S                h
lora       :math:`B A h`                       (D + S) R          h and A h
adapter    :math:`B \sigma(A h)`                (D + S) R          h and A h
maxpool    max over r neighbouring channels    none               nothing
avgpool    mean over r neighbouring channels   none               nothing
=========  ==================================  =================  ==========================
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

DownsampleKind = Literal["linear", "lora", "adapter", "maxpool", "avgpool"]


class LowRankDownsample(nn.Module):
    r"""Downsample through a bottleneck: :math:`\mathrm{norm}(B\,\sigma(A h))`.

    With the identity as activation this is the paper's LoRA downsampler, otherwise its Adapter.
    The authors' code adds a LayerNorm behind the adapter.

    Args:
        in_dim (int): D, width of the hidden state.
        out_dim (int): S, width of the side network.
        rank (int): R, width of the bottleneck.
        activation (nn.Module | None): :math:`\sigma`; None for the identity.
        norm (nn.Module | None): applied to the ``[..., S]`` output; None for none.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        *,
        activation: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.reduce = nn.Linear(in_dim, rank, bias=False)
        self.expand = nn.Linear(rank, out_dim, bias=False)
        self.activation = activation or nn.Identity()
        self.norm = norm or nn.Identity()

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Map ``[..., D]`` to ``[..., S]``.

        Args:
            h (torch.Tensor): hidden state of the backbone, ``[..., D]``.

        Returns:
            torch.Tensor: ``[..., S]``.
        """
        y: torch.Tensor = self.norm(self.expand(self.activation(self.reduce(h))))
        return y


class PoolDownsample(nn.Module):
    """Pool neighbouring channels; S channels come out whether or not S divides D.

    Where S does not divide D the windows are those of adaptive pooling: channel j covers inputs
    ``floor(j D / S)`` up to ``ceil((j + 1) D / S)``.

    Args:
        out_dim (int): S, width of the side network.
        kind (Literal["maxpool", "avgpool"]): which statistic of a window is taken.
    """

    def __init__(self, out_dim: int, kind: Literal["maxpool", "avgpool"]) -> None:
        super().__init__()
        self.out_dim = out_dim
        self.kind = kind

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Map ``[..., D]`` to ``[..., S]``.

        Args:
            h (torch.Tensor): hidden state of the backbone, ``[..., D]``.

        Returns:
            torch.Tensor: ``[..., S]``.
        """
        in_dim = h.shape[-1]
        if in_dim % self.out_dim == 0:
            windows = h.unflatten(-1, (self.out_dim, in_dim // self.out_dim))
            return torch.amax(windows, -1) if self.kind == "maxpool" else torch.mean(windows, -1)
        pool = F.adaptive_max_pool1d if self.kind == "maxpool" else F.adaptive_avg_pool1d
        pooled: torch.Tensor = pool(h.flatten(0, -2).unsqueeze(1), self.out_dim)
        return pooled.view(*h.shape[:-1], self.out_dim)


def build_downsample(
    kind: DownsampleKind, in_dim: int, out_dim: int, *, rank: int, norm: bool
) -> nn.Module:
    """Build one downsampler.

    Args:
        kind (DownsampleKind): which of the five.
        in_dim (int): D, width of the backbone.
        out_dim (int): S, width of the side network.
        rank (int): bottleneck of "lora" and "adapter"; the others ignore it.
        norm (bool): put a LayerNorm behind the adapter, as the authors' code does.

    Returns:
        nn.Module: maps ``[..., D]`` to ``[..., S]``.

    Raises:
        ValueError: if ``kind`` is none of the five or ``rank`` is below 1.
    """
    if kind not in get_args(DownsampleKind):
        known = ", ".join(get_args(DownsampleKind))
        raise ValueError(f"downsample={kind!r} is unknown; choose one of {known}")
    if kind == "linear":
        return nn.Linear(in_dim, out_dim, bias=False)
    if kind in ("maxpool", "avgpool"):
        return PoolDownsample(out_dim, kind)
    if rank < 1:
        raise ValueError(f"rank={rank} of the {kind} downsampler must be at least 1")
    activation = nn.SiLU() if kind == "adapter" else None
    layer_norm = nn.LayerNorm(out_dim) if norm and kind == "adapter" else None
    return LowRankDownsample(in_dim, out_dim, rank, activation=activation, norm=layer_norm)
