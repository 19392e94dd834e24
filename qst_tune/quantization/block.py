"""Blockwise 8-bit codes of activations: a cheap way to save a tensor for backward."""

import torch

BLOCK_SIZE = 64


def quantize_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to symmetric 8-bit integers, one scale for each block of up to 64 channels.

    Blocks confine the few huge channels that every large language model has: with one scale a
    token, those would round all others to zero.

    Args:
        x (torch.Tensor): floating point, ``[..., D]``.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: int8 codes ``[..., D]``, and scales
        ``[..., ceil(D / 64)]`` in the dtype of ``x``.
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
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
    blocks: torch.Tensor = padded.unflatten(-1, (-1, BLOCK_SIZE))
    return blocks
