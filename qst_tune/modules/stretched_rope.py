"""Rotary embeddings that torchtune 0.6.1 lacks: stretched ones, and ones of a part of each head."""

from collections.abc import Sequence

import torch
from torch import nn


class StretchedRoPE(nn.Module):
    r"""Rotary embedding of a head's first channels, each frequency divided by a number of its own.

    .. math::
        \theta_i = \frac{b^{-2i/R}}{s_i}, \qquad
        (x_i,\ x_{i+R/2}) \mapsto a\,(x_i \cos p\theta_i - x_{i+R/2} \sin p\theta_i,\
        x_{i+R/2} \cos p\theta_i + x_i \sin p\theta_i)

    where p is the position, b the base, :math:`i < R/2`, and channels from R on stay as they are.
    Channel i turns with channel i + R/2, as in transformers and in torchtune's Qwen2 and Phi-3;
    torchtune's Llama turns neighbours, and has the rows of q and k permuted for it.

    Source: linear scaling, YaRN and LongRoPE as in transformers' ``modeling_rope_utils.py``; they
    differ in s and a alone, which the caller computes.

    Args:
        dim (int): R, even: how many channels of a head turn.
        max_seq_len (int): positions in the cache.
        base (float): b.
        divisors (Sequence[float] | None): s, one for each of the R/2 frequencies; None: all 1.
        attention_factor (float): a.
    """

    def __init__(
        self,
        dim: int,
        max_seq_len: int = 4096,
        base: float = 10_000.0,
        *,
        divisors: Sequence[float] | None = None,
        attention_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.max_seq_len = max_seq_len
        self.base = base
        self.divisors = None if divisors is None else tuple(divisors)
        self.attention_factor = attention_factor
        self.rope_init()

    def rope_init(self) -> None:
        """Compute the cache, on the default device; recipes call it once that is not meta."""
        theta = 1.0 / self.base ** (torch.arange(0, self.dim, 2).float() / self.dim)
        if self.divisors is not None:
            theta = theta / torch.tensor(self.divisors, dtype=torch.float32)
        angle = torch.arange(self.max_seq_len).float()[:, None] * theta
        cache = torch.stack([angle.cos(), angle.sin()]) * self.attention_factor
        self.register_buffer("cache", cache, persistent=False)

    def forward(self, x: torch.Tensor, *, input_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Turn queries or keys.

        Args:
            x (torch.Tensor): ``[B, T, H, K]``, K at least R.
            input_pos (torch.Tensor | None): positions, ``[B, T]`` or ``[T]``; None: the index.

        Returns:
            torch.Tensor: ``[B, T, H, K]``, in the dtype of ``x``.
        """
        length, half = x.shape[1], self.dim // 2
        cache = self.get_buffer("cache")
        cache = cache[:, :length] if input_pos is None else cache[:, input_pos]
        cos, sin = cache.view(2, -1, length, 1, half).to(x.dtype)
        first, second, still = x.split([half, half, x.shape[-1] - self.dim], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, still], dim=-1)
