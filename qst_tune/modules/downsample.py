r"""Downsamplers: they bring a hidden state of the backbone to the width of the side network.

The five of QST (https://arxiv.org/abs/2401.07159, section 3.2); D is the backbone's width,
S = D / r the side network's, R the rank:

=======  =================================  =============  =======================
kind     equation                           parameters     saved for backward
=======  =================================  =============  =======================
linear   :math:`W h`                        D S            h, D numbers a token
lora     :math:`B A h`                      (D + S) R      h
adapter  :math:`B \sigma(A h)`               (D + S) R      h
maxpool  max over r neighbouring channels   none           S numbers a token
avgpool  mean over r neighbouring channels  none           S numbers a token
=======  =================================  =============  =======================

What is kept is the memory that grows with the batch, so each downsampler has two parts:
``read`` runs without gradient and returns all that must be kept of h; ``project`` is the trained
rest. One that must keep h may do so in 8 bits (:mod:`qst_tune.quantization.block`).

Dropout belongs to ``read``: it needs no gradient there, so that no mask is kept, and a step that is
recomputed in backward starts from what was read and cannot draw another mask.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from qst_tune.quantization.block import dequantize_blocks, quantize_blocks

DownsampleKind = Literal["linear", "lora", "adapter", "maxpool", "avgpool"]
Activation = Literal["silu", "relu", "gelu", "identity"]
Kept = tuple[torch.Tensor, ...]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}


class Downsample(nn.Module):
    """What all downsamplers share: ``forward(h) == project(*read(h))``.

    Args:
        hidden_bits (int): 16 keeps h as it is, 8 keeps integer codes of it with one scale for
            every 64 channels; the forward pass sees the decoded values too, so its gradient is
            exact.
        dropout (float): share of the channels of h that are read as 0 in training, the others as
            h / (1 - dropout). Default: 0.
    """

    def __init__(self, hidden_bits: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden_bits = hidden_bits
        self.dropout = dropout

    @torch.no_grad()
    def read(self, h: torch.Tensor) -> Kept:
        """Return what backward needs of a hidden state, some of it dropped; without gradient.

        Args:
            h (torch.Tensor): hidden state of the backbone, ``[..., D]``.

        Returns:
            Kept: what :meth:`project` takes.
        """
        if self.training and self.dropout > 0:
            h = F.dropout(h, self.dropout)
        return self._summary(h)

    def _summary(self, h: torch.Tensor) -> Kept:
        """What is kept: h itself, or its codes and scales."""
        return (h,) if self.hidden_bits == 16 else quantize_blocks(h)

    def project(self, *kept: torch.Tensor) -> torch.Tensor:
        """Apply the trained part.

        Args:
            *kept (torch.Tensor): from :meth:`read`.

        Returns:
            torch.Tensor: ``[..., S]``.
        """
        raise NotImplementedError

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Read and project.

        Args:
            h (torch.Tensor): hidden state of the backbone, ``[..., D]``.

        Returns:
            torch.Tensor: ``[..., S]``.
        """
        return self.project(*self.read(h))

    def _hidden(self, kept: Kept) -> torch.Tensor:
        return kept[0] if self.hidden_bits == 16 else dequantize_blocks(*kept)


class LinearDownsample(Downsample):
    """Downsample by one trained matrix.

    Args:
        in_dim (int): D, width of the hidden state.
        out_dim (int): S, width of the side network.
        hidden_bits (int): see :class:`Downsample`.
        dropout (float): see :class:`Downsample`.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *, hidden_bits: int = 16, dropout: float = 0.0
    ) -> None:
        super().__init__(hidden_bits, dropout)
        self.reduce = nn.Linear(in_dim, out_dim, bias=False)

    def project(self, *kept: torch.Tensor) -> torch.Tensor:
        """Apply the matrix.

        Args:
            *kept (torch.Tensor): from :meth:`read`.

        Returns:
            torch.Tensor: ``[..., S]``.
        """
        y: torch.Tensor = self.reduce(self._hidden(kept))
        return y


class LowRankDownsample(Downsample):
    r"""Downsample through a bottleneck: :math:`\mathrm{norm}(B\,\sigma(A h))`.

    With the identity as activation this is the paper's LoRA downsampler, otherwise its Adapter.
    The authors' code adds a LayerNorm behind the adapter.

    Args:
        in_dim (int): D, width of the hidden state.
        out_dim (int): S, width of the side network.
        rank (int): R, width of the bottleneck.
        activation (nn.Module | None): :math:`\sigma`; None for the identity.
        norm (nn.Module | None): applied to the ``[..., S]`` output; None for none.
        hidden_bits (int): see :class:`Downsample`.
        dropout (float): see :class:`Downsample`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        *,
        activation: nn.Module | None = None,
        norm: nn.Module | None = None,
        hidden_bits: int = 16,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(hidden_bits, dropout)
        self.reduce = nn.Linear(in_dim, rank, bias=False)
        self.expand = nn.Linear(rank, out_dim, bias=False)
        self.activation = activation or nn.Identity()
        self.norm = norm or nn.Identity()

    def project(self, *kept: torch.Tensor) -> torch.Tensor:
        """Pass the bottleneck.

        Args:
            *kept (torch.Tensor): from :meth:`read`.

        Returns:
            torch.Tensor: ``[..., S]``.
        """
        narrow = self.activation(self.reduce(self._hidden(kept)))
        y: torch.Tensor = self.norm(self.expand(narrow))
        return y


class PoolDownsample(Downsample):
    """Pool neighbouring channels; S channels come out whether or not S divides D.

    Where S does not divide D the windows are those of adaptive pooling: channel j covers inputs
    ``floor(j D / S)`` up to ``ceil((j + 1) D / S)``.

    Args:
        out_dim (int): S, width of the side network.
        kind (Literal["maxpool", "avgpool"]): which statistic of a window is taken.
        dropout (float): see :class:`Downsample`.
    """

    def __init__(
        self, out_dim: int, kind: Literal["maxpool", "avgpool"], *, dropout: float = 0.0
    ) -> None:
        super().__init__(dropout=dropout)
        self.out_dim = out_dim
        self.kind = kind

    def _summary(self, h: torch.Tensor) -> Kept:
        """The pooled state, ``[..., S]``."""
        in_dim = h.shape[-1]
        if in_dim % self.out_dim == 0:
            windows = h.unflatten(-1, (self.out_dim, in_dim // self.out_dim))
            pooled = windows.amax(-1) if self.kind == "maxpool" else windows.mean(-1)
            return (pooled,)
        pool = F.adaptive_max_pool1d if self.kind == "maxpool" else F.adaptive_avg_pool1d
        pooled = pool(h.flatten(0, -2).unsqueeze(1), self.out_dim)
        return (pooled.view(*h.shape[:-1], self.out_dim),)

    def project(self, *kept: torch.Tensor) -> torch.Tensor:
        """Nothing is trained.

        Args:
            *kept (torch.Tensor): from :meth:`read`.

        Returns:
            torch.Tensor: the pooled state.
        """
        return kept[0]


def build_downsample(  # a builder, as those of models/
    kind: DownsampleKind,
    in_dim: int,
    out_dim: int,
    *,
    rank: int,
    activation: Activation = "silu",
    norm: bool = False,
    hidden_bits: int = 16,
    dropout: float = 0.0,
) -> Downsample:
    """Build one downsampler.

    Args:
        kind (DownsampleKind): which one.
        in_dim (int): D, width of the backbone.
        out_dim (int): S, width of the side network.
        rank (int): R of "lora" and "adapter"; the others ignore it.
        activation (Activation): of the "adapter": "silu", as in the authors' code, "relu", "gelu"
            or "identity".
        norm (bool): put a LayerNorm behind an "adapter", as the authors' code does.
        hidden_bits (int): 16 or 8 bits a number for what "linear", "lora" and "adapter" keep.
        dropout (float): share of the channels that are not read in training.

    Returns:
        Downsample: maps ``[..., D]`` to ``[..., S]``.
    """
    if kind == "maxpool" or kind == "avgpool":
        return PoolDownsample(out_dim, kind, dropout=dropout)
    if kind == "linear":
        return LinearDownsample(in_dim, out_dim, hidden_bits=hidden_bits, dropout=dropout)
    return LowRankDownsample(
        in_dim,
        out_dim,
        rank,
        activation=_ACTIVATIONS[activation]() if kind == "adapter" else None,
        norm=nn.LayerNorm(out_dim) if norm and kind == "adapter" else None,
        hidden_bits=hidden_bits,
        dropout=dropout,
    )
