"""How the side network's equations are computed: their dtype, and what backward needs of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.utils.checkpoint import checkpoint

from qst_tune.torchtune_compat import Mask

# torch's default for bf16, 0.008, is as large as the mean square of some embeddings.
_NORM_EPS = 1e-6
# Channels a head: torch's flex_attention refuses fewer (torch 2.11, CUDA).
_NARROWEST_FLEX_HEAD = 16


def normalized(h: torch.Tensor) -> torch.Tensor:
    """Divide each token's state by its root mean square; what this has returned stays as it is.

    So side networks that read one batch in turn share what they save of it.
    """
    if getattr(h, "is_normalized", False):
        return h
    divided: Any = F.rms_norm(h, h.shape[-1:], eps=_NORM_EPS)
    divided.is_normalized = True
    result: torch.Tensor = divided
    return result


def compute_like(
    h: torch.Tensor,
    equation: Callable[..., torch.Tensor],
    *inputs: torch.Tensor,
    parameters: torch.dtype,
    recompute: bool = False,
) -> torch.Tensor:
    """Compute ``equation(*inputs)`` in the dtype of ``h``, with parameters of another dtype.

    ``recompute`` saves nothing but the inputs and computes again in backward.
    """
    # The closure lives until backward: one that held h itself would keep every hidden state.
    dtype, device_type = h.dtype, h.device.type

    def in_dtype(*inputs: torch.Tensor) -> torch.Tensor:
        with _autocast(dtype, parameters, device_type):
            return equation(*inputs)

    if recompute and torch.is_grad_enabled():
        recomputed: torch.Tensor = checkpoint(in_dtype, *inputs, use_reentrant=False)
        return recomputed
    return in_dtype(*inputs)


def _autocast(
    dtype: torch.dtype, parameters: torch.dtype, device_type: str
) -> AbstractContextManager[None]:
    """Products in ``dtype``; nothing to do when the parameters have it already."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    needed = narrow and parameters != dtype
    return torch.autocast(device_type, dtype=dtype if narrow else None, enabled=needed)


def mask_for_heads(mask: Mask | None, head_dim: int, tokens: torch.Tensor) -> Mask | None:
    """Turn the mask of packed rows on CUDA into ``[B, T, T]`` where heads are too narrow for it.

    Those of ``variant="paper"`` are.
    """
    if not isinstance(mask, BlockMask) or head_dim >= _NARROWEST_FLEX_HEAD:
        return mask
    batch, length = tokens.shape
    dense = create_mask(mask.mask_mod, batch, None, length, length, device=tokens.device)
    return dense.squeeze(1)
