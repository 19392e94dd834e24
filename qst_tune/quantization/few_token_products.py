"""Products of a few tokens with a quantised weight, without decoding it first.

``kernels.py`` says where there is one. The layers decode and multiply where it is None.
"""

import torch
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.quantization.affine import AffineLayout
from qst_tune.quantization.kernels import (
    KERNEL_DTYPES,
    has_int8_kernel,
    is_few_tokens,
    runs_triton,
    triton_decodes_affine,
)
from qst_tune.quantization.nf4 import absmax_unless_double_quantized


def nf4_product(x: torch.Tensor, weight: NF4Tensor) -> torch.Tensor | None:
    """Multiply few tokens ``[..., I]`` with an NF4 or FP4 weight ``[O, I]``, or return None."""
    by_triton = runs_triton(weight.quantized_data, weight.dtype) and x.dtype in KERNEL_DTYPES
    if not by_triton or not is_few_tokens(x) or weight.shape[1] % 2:
        return None
    from qst_tune.quantization import triton_products

    return triton_products.nf4_product(x, weight, absmax_unless_double_quantized(weight))


def affine_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor,
    layout: AffineLayout,
) -> torch.Tensor | None:
    """Multiply few tokens ``[..., I]`` with an integer weight, or return None.

    The other arguments are those of :func:`~.affine.dequantize_affine`.
    """
    if not is_few_tokens(x):
        return None
    if triton_decodes_affine(codes, weight_scale, layout.bits, x.dtype):
        from qst_tune.quantization import triton_products

        return triton_products.affine_product(x, codes, weight_scale, zero_point, layout)
    runs_kernel = x.is_cpu and x.dtype == torch.bfloat16 and zero_point.dtype == torch.uint8
    if runs_kernel and has_int8_kernel(layout):
        return int8_product(x, codes, weight_scale, zero_point)
    return None


def int8_product(
    x: torch.Tensor, codes: torch.Tensor, weight_scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    r"""Multiply with an 8-bit weight of one scale and zero point a channel, by torch's CPU kernel.

    .. math:: y_o = s_o \Big(\sum_i x_i (q_{oi} - 128) - (z_o - 128) \sum_i x_i\Big)

    The first sum is the kernel's: of signed bytes, added in fp32 and rounded to bf16.

    Args:
        x (torch.Tensor): ``[..., I]`` in bf16: in fp32 the kernel is 20 times slower.
        codes (torch.Tensor): ``[O, I]`` uint8, as ``packing.py`` stores 8 bits.
        weight_scale (torch.Tensor): ``[O, 1]`` fp32.
        zero_point (torch.Tensor): ``[O, 1]`` uint8.

    Returns:
        torch.Tensor: ``[..., O]`` in bf16.
    """
    x_MI = x.reshape(-1, x.shape[-1])
    # The kernel takes scales in bf16 only, which would round ours.
    y_MO = torch._weight_int8pack_mm(x_MI, codes.view(torch.int8), x.new_ones(len(codes)))
    centre = (zero_point.view(-1) ^ 128).view(torch.int8)  # z - 128, without wider temporaries
    y_MO = y_MO.sub(x_MI.sum(-1, keepdim=True, dtype=torch.float32) * centre)
    return y_MO.mul_(weight_scale.view(-1)).to(x.dtype).view(*x.shape[:-1], len(codes))
