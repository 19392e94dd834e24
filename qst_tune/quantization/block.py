"""Blockwise integer codes of activations: a cheap way to save a tensor for backward."""

import torch

BLOCK_SIZE = 64


def quantize_blocks(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to symmetric integers, one scale for each block of up to 64 channels.

    Blocks confine the few huge channels that every large language model has: with one scale a
    token, those would round all others to zero.

    Args:
        x (torch.Tensor): floating point, ``[..., D]``.
        bits (int): 8, or 4 (two codes in a byte; D must be even).

    Returns:
        tuple[torch.Tensor, torch.Tensor]: int8 codes ``[..., D]`` (8 bits) or uint8 bytes
        ``[..., D / 2]`` (4 bits), and scales ``[..., ceil(D / 64)]`` in the dtype of ``x``.
    """
    dim = x.shape[-1]
    if bits not in (4, 8) or (bits == 4 and dim % 2):
        raise ValueError(f"{dim} channels cannot be kept in {bits} bits; use 8, or 4 if even")
    largest = 127 if bits == 8 else 7
    blocks = _blocks(x)
    scale = blocks.abs().amax(-1, keepdim=True) / largest
    codes = (blocks / scale.clamp(min=torch.finfo(x.dtype).tiny)).round_()
    codes = codes.clamp_(-largest, largest).to(torch.int8).flatten(-2)[..., :dim]
    if bits == 4:
        unsigned = (codes + 8).to(torch.uint8)
        codes = unsigned[..., ::2] << 4 | unsigned[..., 1::2]
    return codes.contiguous(), scale.squeeze(-1)


def dequantize_blocks(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decode the result of :func:`quantize_blocks` to ``[..., D]`` in the dtype of ``scale``."""
    if codes.dtype == torch.uint8:
        pairs = torch.stack([codes >> 4, codes & 0xF], dim=-1)
        codes = pairs.flatten(-2).to(torch.int8) - 8
    blocks = _blocks(codes.to(scale.dtype))
    decoded = (blocks * scale.unsqueeze(-1)).flatten(-2)
    return decoded[..., : codes.shape[-1]]


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """``[..., D]`` as ``[..., ceil(D / 64), 64]``, zeros after the last channel."""
    missing = -x.shape[-1] % BLOCK_SIZE
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
    blocks: torch.Tensor = padded.unflatten(-1, (-1, BLOCK_SIZE))
    return blocks
