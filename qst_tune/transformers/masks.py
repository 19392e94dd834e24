"""Attention masks and positions as torchtune takes them, out of those that transformers gives.

L is the number of tokens in the cache and of new ones together, T that of the new ones.
"""

import torch
import torch.nn.functional as F


def attention_mask_of(
    attention_mask: torch.Tensor | None, *, start: int, length: int, like: torch.Tensor
) -> torch.Tensor:
    """Make torchtune's mask.

    Args:
        attention_mask (torch.Tensor | None): ``[B, L]``, 0 for padding; or ``[B, 1, T, L]``
            booleans, longer than L for a static cache; or ``[B, T, T]`` booleans, taken as it is.
        start (int): tokens in the cache.
        length (int): L.
        like (torch.Tensor): the new tokens ``[B, T]``, for their device.

    Returns:
        torch.Tensor: ``[B, T, L]`` or ``[1, T, L]`` booleans, True where a token may attend. Each
        attends to itself, also padding: a row without any would give NaN.

    Raises:
        ValueError: if the mask has another number of dimensions, or of tokens, or is not boolean
            where it should be.
    """
    everywhere = torch.arange(length, device=like.device)
    positions = everywhere[start:, None]
    causal_TL = positions >= everywhere
    if attention_mask is None:
        return causal_TL[None]
    if attention_mask.ndim == 3 and attention_mask.dtype == torch.bool:
        return attention_mask
    if attention_mask.ndim == 4 and attention_mask.dtype == torch.bool:
        allowed = attention_mask[:, 0, :, :length]
    elif attention_mask.ndim == 2 and attention_mask.shape[1] == length:
        allowed = attention_mask.bool()[:, None, :]
    else:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} and type "
            f"{attention_mask.dtype} is not supported: give [batch, {length}], 0 for padding, or "
            "booleans [batch, 1, new tokens, all tokens]"
        )
    return (causal_TL & allowed) | (positions == everywhere)


def positions_of(
    attention_mask: torch.Tensor | None, *, start: int, length: int, like: torch.Tensor
) -> torch.Tensor:
    """Count the new tokens' positions, padding left out where the mask tells it.

    Args:
        attention_mask (torch.Tensor | None): as in :func:`attention_mask_of`.
        start (int): tokens in the cache.
        length (int): L.
        like (torch.Tensor): the new tokens ``[B, T]``, for their device.

    Returns:
        torch.Tensor: ``[B, T]`` or ``[1, T]``.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(start, length, device=like.device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, start:]


def packed_mask(positions_BT: torch.Tensor) -> torch.Tensor | None:
    """Make the mask of rows in which a sample begins wherever positions begin again.

    Args:
        positions_BT (torch.Tensor): ``[B, T]``.

    Returns:
        torch.Tensor | None: ``[B, T, T]`` booleans, causal inside each sample; None if each row is
        one sample.
    """
    begins = positions_BT[:, 1:] <= positions_BT[:, :-1]
    if not bool(begins.any()):
        return None
    sample = F.pad(begins.long().cumsum(-1), (1, 0))
    return (sample[:, :, None] == sample[:, None, :]).tril()
