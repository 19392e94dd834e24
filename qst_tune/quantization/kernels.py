"""Which kernel computes with a quantised weight: chosen here, by device, dtype and token count.

============  ===========================  ================================================
device        decoding                     product of few tokens
============  ===========================  ================================================
CUDA, sm_80+  Triton: NF4, FP4, int4, 8    Triton in generation, up to 16 tokens, the same
                                           formats (``few_tokens.py``)
CPU           tables and torch's kernels   torch's int8 kernel, up to 64 tokens in bf16:
                                           8 bits, a scale per channel
============  ===========================  ================================================

Everything else decodes by tables and multiplies. A product of few tokens has no gradient. Triton's
kernels are used if they pass a comparison with the tables, at the first use of a GPU
(``find_fault``); if not, a warning names the difference, and the tables are used.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torchtune import utils

if TYPE_CHECKING:
    from qst_tune.quantization.affine import AffineLayout

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_TOKENS = 64
# The first GPUs with bf16, which the kernels' tiles are made for.
_OLDEST_GPU = (8, 0)

FindFault: TypeAlias = Callable[[str], str | None]

log = utils.get_logger("INFO")


class _Allowed:
    """Whether Triton's kernels may run in this process, on whichever thread."""

    triton = True


def allow_triton(allowed: bool) -> None:
    """Let this process use Triton's kernels where it can, or nowhere."""
    _Allowed.triton = allowed


@lru_cache(maxsize=32)  # each card of a machine: they may be of several kinds
def _runs_triton_on(device: torch.device) -> bool:
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < _OLDEST_GPU:
        return False
    return passes_trial(str(device))


def passes_trial(device: str, find_fault: FindFault | None = None) -> bool:
    """Compare Triton's kernels with torch on this device; a fault is logged.

    ``find_fault`` None: those that decode, with the tables.
    """
    if find_fault is None:
        from qst_tune.quantization import triton_decoding

        find_fault = triton_decoding.find_fault
    fault = find_fault(device)
    if fault is not None:
        slower = "torch's operations" if "fused" in find_fault.__module__ else "tables"
        log.warning(f"Triton's kernels are not used here, the slower {slower} are: {fault}")
    return fault is None


def runs_triton(codes: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels decode these codes; an estimate's fake tensors are not decoded."""
    is_known = type(codes) is torch.Tensor and dtype in KERNEL_DTYPES
    return _Allowed.triton and is_known and _runs_triton_on(codes.device)


def triton_decodes_affine(
    codes: torch.Tensor, weight_scale: torch.Tensor, bits: int, dtype: torch.dtype
) -> bool:
    """Whether Triton's kernels decode such a weight: of 4 or 8 bits, with scales in fp32."""
    return bits in (4, 8) and weight_scale.dtype == torch.float32 and runs_triton(codes, dtype)


def is_few_tokens(x: torch.Tensor) -> bool:
    """Whether decoding a weight takes most of its product with ``x``, ``[..., I]``.

    Only on a CPU, and never where a gradient may be wanted.
    """
    num_tokens = x.numel() // max(1, x.shape[-1])
    return x.is_cpu and not torch.is_grad_enabled() and 0 < num_tokens <= _MOST_TOKENS


def has_int8_kernel(layout: "AffineLayout | None") -> bool:
    """Whether torch's CPU kernel multiplies such rows: of 8 bits, with one scale each.

    For rows that are not of whole vectors it returns garbage (torch 2.13: 50 columns).
    """
    if layout is None:
        return False
    return layout.bits == 8 and layout.num_groups == 1 and layout.in_dim % 32 == 0


def affine_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor,
    layout: "AffineLayout",
) -> torch.Tensor | None:
    """Multiply few tokens ``[..., I]`` with an integer weight; None: decode it first.

    The other arguments are those of :func:`~.affine.dequantize_affine`.
    """
    runs_kernel = x.is_cpu and x.dtype == torch.bfloat16 and zero_point.dtype == torch.uint8
    if is_few_tokens(x) and runs_kernel and has_int8_kernel(layout):
        return int8_product(int8_weight(codes, weight_scale, zero_point), x)
    return None


class Int8Weight(NamedTuple):
    """An 8-bit weight of one scale and zero point a channel, as torch's CPU kernel needs it."""

    codes: torch.Tensor  # q - 128, int8 [O, I]
    ones: torch.Tensor  # bf16 [O]: the kernel takes scales in bf16 only, which would round ours
    weight_scale: torch.Tensor  # s, fp32 [O]
    centre: torch.Tensor  # z - 128, fp32 [O]


def int8_weight(
    codes: torch.Tensor, weight_scale: torch.Tensor, zero_point: torch.Tensor
) -> Int8Weight:
    """Prepare a weight: ``codes`` as ``packing.py`` stores 8 bits, the others ``[O, 1]``."""
    ones = torch.ones(len(codes), dtype=torch.bfloat16)
    centre = (zero_point.view(-1) ^ 128).view(torch.int8).float()
    return Int8Weight(codes.view(torch.int8), ones, weight_scale.view(-1), centre)


def int8_product(weight: Int8Weight, x: torch.Tensor) -> torch.Tensor:
    r"""Multiply ``x``, bf16 ``[..., I]``, with a prepared weight, by torch's CPU kernel.

    .. math:: y_o = s_o \Big(\sum_i x_i (q_{oi} - 128) - (z_o - 128) \sum_i x_i\Big)

    The first sum is the kernel's: of signed bytes, added in fp32 and rounded to bf16. In fp32 the
    kernel is 20 times slower.
    """
    x_MI = x.reshape(-1, x.shape[-1])
    y_MO = torch._weight_int8pack_mm(x_MI, weight.codes, weight.ones).float()
    sum_M1 = x_MI.sum(-1, keepdim=True, dtype=torch.float32)
    y_MO.addcmul_(sum_M1, weight.centre, value=-1).mul_(weight.weight_scale)
    return y_MO.to(x.dtype).view(*x.shape[:-1], -1)
