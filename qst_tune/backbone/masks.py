"""Attention masks of padded rows for the side network.

L is the number of tokens that are cached and new together, T that of the new ones.
"""

import torch


def causal_mask(padding_BL: torch.Tensor, num_new: int) -> torch.Tensor:
    """Make a causal mask ``[B, T, L]`` that hides padding, false in ``padding_BL``.

    True where a token may attend. Each attends to itself, also padding: a row without any would
    give NaN.
    """
    everywhere = torch.arange(padding_BL.shape[1], device=padding_BL.device)
    new = everywhere[-num_new:, None]
    return ((new >= everywhere) & padding_BL.bool()[:, None, :]) | (new == everywhere)


def positions(padding_BL: torch.Tensor, num_new: int) -> torch.Tensor:
    """Count the positions ``[B, T]`` of the new tokens without padding, false in ``padding_BL``."""
    return (padding_BL.long().cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
