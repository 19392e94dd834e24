"""Attention masks and positions as torchtune takes them, out of those that transformers gives.

L is the number of tokens in the cache and of new ones together, T that of the new ones.
"""

import torch
import torch.nn.functional as F

from qst_tune.backbone.masks import causal_mask, positions


def attention_mask_of(
    attention_mask: torch.Tensor | None, *, start: int, length: int, like: torch.Tensor
) -> torch.Tensor:
    """Make torchtune's mask, ``[B, T, L]`` or ``[1, T, L]`` booleans, True: a token may attend.

    Given are ``[B, L]``, 0 for padding; or ``[B, 1, T, L]`` booleans, longer than L for a static
    cache; or ``[B, T, T]`` booleans, taken as they are. ``start`` tokens are in the cache,
    ``length`` is L, and ``like`` has the new tokens' device. Each token attends to itself, also
    padding: a row without any would give NaN. ValueError for a mask of another shape or type.
    """
    every = like.new_ones(1, length)
    mask = every if attention_mask is None else attention_mask
    if mask.ndim == 2 and mask.shape[1] == length:
        return causal_mask(mask, length - start)
    if mask.ndim == 3 and mask.dtype == torch.bool:
        return mask
    if mask.ndim == 4 and mask.dtype == torch.bool:
        itself = torch.eye(length, dtype=torch.bool, device=like.device)[start:]
        return (causal_mask(every, length - start) & mask[:, 0, :, :length]) | itself
    raise ValueError(
        f"attention_mask of shape {tuple(mask.shape)} and type {mask.dtype} is not supported: give "
        f"[batch, {length}], 0 for padding, or booleans [batch, 1, new tokens, all tokens]"
    )


def positions_of(
    attention_mask: torch.Tensor | None, *, start: int, length: int, like: torch.Tensor
) -> torch.Tensor:
    """Count the new tokens' positions, without padding if the mask is one of padding."""
    if attention_mask is None or attention_mask.ndim != 2:
        attention_mask = like.new_ones(1, length)
    return positions(attention_mask, length - start)


def packed_mask(positions_BT: torch.Tensor) -> torch.Tensor | None:
    """Make the mask ``[B, T, T]`` of rows in which a sample begins where positions begin again.

    Booleans, causal inside each sample; None if each row is one sample.
    """
    begins = positions_BT[:, 1:] <= positions_BT[:, :-1]
    if not bool(begins.any()):
        return None
    sample = F.pad(begins.long().cumsum(-1), (1, 0))
    return (sample[:, :, None] == sample[:, None, :]).tril()
