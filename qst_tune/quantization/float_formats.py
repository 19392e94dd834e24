"""Read 8-bit floats with a scale for the whole, each channel or block (FP8), and MXFP4."""

import torch

from qst_tune.quantization.stored import StoredNF4


def decode_float8(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None = None
) -> torch.Tensor:
    """Multiply FP8 values ``[..., O, I]`` with their scales, to fp32.

    ``scale`` is one number; one a row, ``[..., O]`` or ``[..., O, 1]``; or, with a ``block`` of
    b x c, ``[..., ceil(O / b), ceil(I / c)]``. ValueError if the shapes do not belong together.

    Source: ``weight_dequant`` of github.com/deepseek-ai/DeepSeek-V3 (its ``weight_scale_inv`` is
    multiplied too, despite its name); "float-quantized" of compressed-tensors.
    """
    values, factors = weight.float(), scale.float()
    if factors.numel() == 1:
        return values * factors.reshape(())
    if factors.shape == values.shape[:-1]:
        factors = factors.unsqueeze(-1)
    sizes = (1, values.shape[-1]) if block is None else block
    wanted = tuple(-(-size // b) for size, b in zip(values.shape[-2:], sizes, strict=True))
    if factors.shape != (*values.shape[:-2], *wanted):
        raise ValueError(
            f"scales {tuple(scale.shape)} are not those of {tuple(weight.shape)} in blocks of "
            f"{sizes[0]} x {sizes[1]}"
        )
    for dim, size in zip((-2, -1), sizes, strict=True):
        factors = factors.repeat_interleave(size, dim).narrow(dim, 0, values.shape[dim])
    return values * factors


BLOCK_SIZE = 32
# 1 bit sign, 2 exponent, 1 mantissa, in the order of the codes.
_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LEVELS = (*_SIZES, *(-size for size in _SIZES))
_EXPONENT_OF_ONE = 127


def read_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> StoredNF4:
    r"""Read a weight of gpt-oss's experts: :math:`w = 2^{e - 127}\,L[q]`.

    ``blocks`` are ``[O, I / 32, 16]`` uint8, two codes a byte, the first in the low half;
    ``scales`` ``[O, I / 32]`` uint8 exponents e. It fits the parts of an NF4 weight: the 16 levels
    are E2M1's, the scaler codes are the exponents, and their map contains the 256 powers of two.
    All of it is exact in bf16.

    Source: OCP Microscaling Formats (MX) 1.0; the tensors of github.com/openai/gpt-oss.
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
