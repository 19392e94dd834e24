"""Products of a few tokens with a quantised weight, without decoding it first.

``kernels.py`` says where there is one. The layers decode and multiply where it is None.
"""

import torch

from qst_tune.quantization.affine import AffineLayout
from qst_tune.quantization.kernels import has_int8_kernel, is_few_tokens


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
    runs_kernel = x.is_cpu and x.dtype == torch.bfloat16 and zero_point.dtype == torch.uint8
    if is_few_tokens(x) and runs_kernel and has_int8_kernel(layout):
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
