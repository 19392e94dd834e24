"""Read MXFP4, the format of gpt-oss's experts: 4-bit floats with an exponent for 32 of them."""

import torch

from qst_tune.quantization.stored import StoredNF4

BLOCK_SIZE = 32
# 1 bit sign, 2 exponent, 1 mantissa, in the order of the codes.
_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LEVELS = (*_SIZES, *(-size for size in _SIZES))
_EXPONENT_OF_ONE = 127


def read_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> StoredNF4:
    r"""Read a weight: :math:`w = 2^{e - 127}\,L[q]`.

    It fits the parts of an NF4 weight: the 16 levels are E2M1's, the scaler codes are the
    exponents, and their map contains the 256 powers of two. All of it is exact in bf16.

    Source: OCP Microscaling Formats (MX) 1.0; the tensors of github.com/openai/gpt-oss.

    Args:
        blocks (torch.Tensor): ``[O, I / 32, 16]`` uint8, two codes a byte, the first in the low
            half.
        scales (torch.Tensor): ``[O, I / 32]`` uint8 exponents e.

    Returns:
        StoredNF4: ``[O, I]``.
    """
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] * 2 != BLOCK_SIZE:
        raise ValueError(f"{tuple(blocks.shape)} codes with {tuple(scales.shape)} exponents")
    powers = torch.ldexp(torch.ones(256), torch.arange(256) - _EXPONENT_OF_ONE)
    return StoredNF4(
        (len(blocks), BLOCK_SIZE * blocks.shape[1]),
        "fp4",
        (blocks << 4 | blocks >> 4).flatten(),  # the first code of a byte is ours in the high half
        scales.flatten(),
        torch.ones(1),
        torch.cat([torch.zeros(1), powers]),
        torch.tensor(_LEVELS),
    )
