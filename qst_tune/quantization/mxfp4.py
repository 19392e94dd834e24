"""Decode MXFP4, the format of gpt-oss's experts: 4-bit floats with an exponent for 32 of them."""

import torch

# 1 bit sign, 2 exponent, 1 mantissa, in the order of the codes.
_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LEVELS = (*_SIZES, *(-size for size in _SIZES))
_EXPONENT_OF_ONE = 127


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    r"""Decode :math:`w = 2^{e - 127}\,L[q]`.

    Source: OCP Microscaling Formats (MX) 1.0; the tensors of github.com/openai/gpt-oss.

    Args:
        blocks (torch.Tensor): ``[..., N, 16]`` uint8, two codes a byte, the first in the low half.
        scales (torch.Tensor): ``[..., N]`` uint8 exponents e.

    Returns:
        torch.Tensor: ``[..., 32 N]`` bf16, which holds these numbers exactly.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != 16:
        raise ValueError(f"{tuple(blocks.shape)} codes with {tuple(scales.shape)} exponents")
    levels = torch.tensor(_LEVELS, dtype=torch.bfloat16, device=blocks.device)
    codes = torch.stack([blocks & 0xF, blocks >> 4], dim=-1).flatten(-2)
    exponents = scales.int() - _EXPONENT_OF_ONE
    return torch.ldexp(levels[codes.int()], exponents.unsqueeze(-1)).to(torch.bfloat16).flatten(-2)
