"""Which kernel computes with a quantised weight: chosen here, by device, dtype and token count.

============  ===========================  ============================================
device        decoding                     product of few tokens
============  ===========================  ============================================
CUDA, sm_80+  Triton: NF4, FP4, int4, 8    decoded first
CPU           tables and torch's kernels   torch's int8 kernel, up to 64 tokens in bf16:
                                           8 bits, a scale per channel
============  ===========================  ============================================

Everything else decodes by tables and multiplies. A product of few tokens has no gradient. Triton's
kernels are used if they pass a comparison with the tables, at the first use of a GPU
(``triton_trial.py``); if not, a warning names the difference, and the tables are used.
"""

from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torchtune import utils

if TYPE_CHECKING:
    from qst_tune.quantization.affine import AffineLayout

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_TOKENS = 64
# The first GPUs with bf16, which the kernels' tiles are made for.
_OLDEST_GPU = (8, 0)

log = utils.get_logger("INFO")


@lru_cache(maxsize=4)
def _runs_triton_on(device_type: str) -> bool:
    if device_type != "cuda" or find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability() < _OLDEST_GPU:
        return False
    return passes_trial(device_type)


def passes_trial(device_type: str) -> bool:
    """Compare Triton's kernels with the tables on this device; a fault is logged."""
    from qst_tune.quantization.triton_trial import find_fault

    fault = find_fault(device_type)
    if fault is not None:
        log.warning(f"Triton's kernels are not used here, the slower tables are: {fault}")
    return fault is None


def runs_triton(codes: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels decode these codes; an estimate's fake tensors are not decoded."""
    is_known = type(codes) is torch.Tensor and dtype in KERNEL_DTYPES
    return is_known and _runs_triton_on(codes.device.type)


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
