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

What is saved is the memory that grows with the batch, so each downsampler has two parts:
``read`` runs without gradient and returns all that must be saved of h; ``project`` is the trained
rest. A downsampler that must save h can do so in 8 bits (``quantize_blocks``).

Dropout belongs to ``read``. It needs no gradient there, so no mask is saved; and a step that is
recomputed in backward starts from what was read, so it cannot draw another mask.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

DownsampleKind = Literal["linear", "lora", "adapter", "maxpool", "avgpool"]
Activation = Literal["silu", "relu", "gelu", "identity"]
Saved = tuple[torch.Tensor, ...]
BLOCK_SIZE = 64  # channels that share a scale in 8 bits

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}


class Downsample(nn.Module):
    """What all downsamplers share: ``forward(h) == project(*read(h))``."""

    # 8 saves integer codes with a scale for every 64 channels. The forward pass sees the decoded
    # values too, so its gradient is exact.
    hidden_bits = 16
    # Share of the channels of h that are read as 0 in training, the others as h / (1 - dropout).
    dropout = 0.0

    @torch.no_grad()
    def read(self, h: torch.Tensor) -> Saved:
        """Return what backward needs of h, ``[..., D]``, some of it dropped; without gradient."""
        if self.training and self.dropout > 0:
            h = F.dropout(h, self.dropout)
        return self._summary(h)

    def _summary(self, h: torch.Tensor) -> Saved:
        """What is saved: h itself, or its codes and scales."""
        return (h,) if self.hidden_bits == 16 else quantize_blocks(h)

    def project(self, *saved: torch.Tensor) -> torch.Tensor:
        """Apply the trained part to what :meth:`read` returned; gives ``[..., S]``."""
        raise NotImplementedError

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Map ``[..., D]`` to ``[..., S]``."""
        return self.project(*self.read(h))

    def _hidden(self, saved: Saved) -> torch.Tensor:
        return saved[0] if self.hidden_bits == 16 else dequantize_blocks(*saved)


class LinearDownsample(Downsample):
    """Downsample from D = ``in_dim`` to S = ``out_dim`` by one trained matrix."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(in_dim, out_dim, bias=False)

    def project(self, *saved: torch.Tensor) -> torch.Tensor:
        """Apply the matrix."""
        y: torch.Tensor = self.reduce(self._hidden(saved))
        return y


class LowRankDownsample(Downsample):
    r"""Downsample through a bottleneck: :math:`\mathrm{norm}(B\,\sigma(A h))`.

    With the identity as activation :math:`\sigma` this is the paper's LoRA downsampler, otherwise
    its Adapter. The authors' code adds a LayerNorm over the ``[..., S]`` output of the adapter.
    """

    def __init__(
        self, in_dim: int, out_dim: int, rank: int, *, activation: nn.Module, norm: nn.Module
    ) -> None:
        super().__init__()
        self.reduce = nn.Linear(in_dim, rank, bias=False)
        self.expand = nn.Linear(rank, out_dim, bias=False)
        self.activation = activation
        self.norm = norm

    def project(self, *saved: torch.Tensor) -> torch.Tensor:
        """Pass the bottleneck."""
        y: torch.Tensor = self.norm(self.expand(self.activation(self.reduce(self._hidden(saved)))))
        return y


class PoolDownsample(Downsample):
    """Pool neighbouring channels to S = ``out_dim`` channels, whether or not S divides D.

    Where S does not divide D the windows are those of adaptive pooling: channel j covers inputs
    ``floor(j D / S)`` up to ``ceil((j + 1) D / S)``.
    """

    def __init__(self, out_dim: int, kind: Literal["maxpool", "avgpool"]) -> None:
        super().__init__()
        self.out_dim = out_dim
        self.kind = kind

    def _summary(self, h: torch.Tensor) -> Saved:
        """The pooled state, ``[..., S]``."""
        in_dim = h.shape[-1]
        if in_dim % self.out_dim == 0:
            windows = h.unflatten(-1, (self.out_dim, in_dim // self.out_dim))
            return (windows.amax(-1) if self.kind == "maxpool" else windows.mean(-1),)
        pool = F.adaptive_max_pool1d if self.kind == "maxpool" else F.adaptive_avg_pool1d
        pooled = pool(h.flatten(0, -2).unsqueeze(1), self.out_dim)
        return (pooled.view(*h.shape[:-1], self.out_dim),)

    def project(self, *saved: torch.Tensor) -> torch.Tensor:
        """Return the pooled state: nothing is trained."""
        return saved[0]


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
    """Build one downsampler, from D = ``in_dim`` to S = ``out_dim``.

    Only "lora" and "adapter" have a ``rank``, and only "adapter" an ``activation`` and, as in the
    authors' code, a LayerNorm (``norm``). The pools ignore ``hidden_bits``.
    """
    down: Downsample
    if kind == "maxpool" or kind == "avgpool":
        down = PoolDownsample(out_dim, kind)
    elif kind == "linear":
        down = LinearDownsample(in_dim, out_dim)
    elif kind == "lora":
        identities = {"activation": nn.Identity(), "norm": nn.Identity()}
        down = LowRankDownsample(in_dim, out_dim, rank, **identities)
    else:
        last = nn.LayerNorm(out_dim) if norm else nn.Identity()
        sigma = _ACTIVATIONS[activation]()
        down = LowRankDownsample(in_dim, out_dim, rank, activation=sigma, norm=last)
    down.hidden_bits, down.dropout = hidden_bits, dropout
    return down


def quantize_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``[..., D]`` to int8 codes, and scales ``[..., ceil(D / 64)]`` in the dtype of ``x``.

    Blocks of up to 64 channels confine the few huge channels that every large language model has:
    with one scale a token, those would round all others to zero.
    """
    blocks = _blocks(x)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks / scale.clamp(min=torch.finfo(x.dtype).tiny)).round_().clamp_(-127, 127)
    return codes.to(torch.int8).flatten(-2)[..., : x.shape[-1]].contiguous(), scale.squeeze(-1)


def dequantize_blocks(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decode the result of :func:`quantize_blocks`, in the dtype of ``scale``."""
    blocks = _blocks(codes.to(scale.dtype))
    return (blocks * scale.unsqueeze(-1)).flatten(-2)[..., : codes.shape[-1]]


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """``[..., D]`` as ``[..., ceil(D / 64), 64]``, zeros behind the last channel."""
    missing = -x.shape[-1] % BLOCK_SIZE
    blocks: torch.Tensor = (F.pad(x, (0, missing)) if missing else x).unflatten(
        -1, (-1, BLOCK_SIZE)
    )
    return blocks
