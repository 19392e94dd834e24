"""Integer weights: a few bits a code, one scale and zero point an output channel or group.

Notation: O output channels, I input channels, G groups a row, g input channels a group.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from qst_tune.quantization.kernels import triton_decodes_affine
from qst_tune.quantization.packing import packed_dim, unpack

AffineInit = Literal["rtn", "mse"]
BITS = (2, 3, 4, 8)

# A group of zeros gets this one instead of 0, as in torchao.
_SMALLEST_SCALE = torch.finfo(torch.float32).eps
# Shares of the full range that "mse" tries.
_SHRINKS = [1 - 0.025 * step for step in range(25)]
# Weights decoded at once, where a temporary in fp32 is needed: 16 MiB.
_WEIGHTS_AT_ONCE = 2**22


class AffineWeight(NamedTuple):
    """A quantised weight; its value is ``weight_scale * (codes - zero_point)``."""

    # [O, G g] uint8, one code a byte; codes of weight 0 fill the last group
    codes: torch.Tensor
    weight_scale: torch.Tensor  # [O, G] fp32, positive
    zero_point: torch.Tensor  # [O, G] uint8


class AffineLayout(NamedTuple):
    """How a row of a weight is stored."""

    bits: int
    group_size: int  # g, input channels that share a scale
    in_dim: int  # I

    @property
    def num_groups(self) -> int:
        """G, the number of scales of a row."""
        return math.ceil(self.in_dim / self.group_size)

    @property
    def num_codes(self) -> int:
        """Codes of a row, including the padding of its last group."""
        return self.num_groups * self.group_size

    @property
    def num_bytes(self) -> int:
        """Bytes of a row's codes."""
        return packed_dim(self.num_codes, self.bits)


def check_affine(bits: int, group_size: int | None, init: str = "rtn") -> None:
    """Refuse unsupported settings with a ValueError, and warn of 2 bits."""
    if bits not in BITS:
        raise ValueError(f"bits={bits} is not supported: use {', '.join(map(str, BITS))}")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size={group_size} must be at least 1, or None for whole channels")
    if init not in ("rtn", "mse"):
        raise ValueError(f"init={init!r} is unknown; choose one of rtn, mse")
    if bits == 2:
        warnings.warn(
            "bits=2: rounding to nearest leaves little of a model at 2 bits, and its scales alone "
            "do not bring it back; use bits=3 or 4",
            stacklevel=2,
        )


def to_groups(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """View rows ``[O, I]`` as groups ``[O, G, g]``; zeros fill the last group."""
    missing = -values.shape[1] % group_size
    padded = F.pad(values, (0, missing)) if missing else values
    return padded.reshape(len(values), -1, group_size)


def quantize_affine(
    weight: torch.Tensor, *, bits: int, group_size: int | None = None, init: AffineInit = "rtn"
) -> AffineWeight:
    r"""Quantise ``[O, I]`` by asymmetric rounding to nearest; ``weight`` may be on meta.

    .. math::
        s = \frac{\max(w, 0) - \min(w, 0)}{2^b - 1}, \quad
        z = \mathrm{round}(-\min(w, 0) / s), \quad
        q = \mathrm{clamp}(\mathrm{round}(w / s) + z,\, 0,\, 2^b - 1)

    The extrema are those of a group (``group_size`` None: of a row), so 0 is always exact.
    ``init="mse"`` also tries narrower ranges, each with the least-squares scale for its codes, and
    each group takes the one with the least squared error.

    Source: PEQA (https://arxiv.org/abs/2305.14152), equation 1; torchao's
    ``choose_qparams_affine`` and ``quantize_affine`` compute the same.
    """
    check_affine(bits, group_size, init)
    groups_OGg = to_groups(weight.detach().float(), group_size or weight.shape[1])
    search = _round_to_nearest if init == "rtn" else _least_squares
    codes, scale, zero_point = search(groups_OGg, bits)
    return AffineWeight(codes.flatten(1), scale.squeeze(-1), zero_point.squeeze(-1))


def _round_to_nearest(w_OGg: torch.Tensor, bits: int, shrink: float = 1.0) -> AffineWeight:
    low = w_OGg.amin(-1, keepdim=True).clamp(max=0) * shrink
    high = w_OGg.amax(-1, keepdim=True).clamp(min=0) * shrink
    largest = 2**bits - 1
    scale = ((high - low) / largest).clamp(min=_SMALLEST_SCALE)
    zero_point = (-low / scale).round().clamp(0, largest)
    codes = ((w_OGg / scale).round() + zero_point).clamp(0, largest)
    return AffineWeight(codes.to(torch.uint8), scale, zero_point.to(torch.uint8))


def _least_squares(w_OGg: torch.Tensor, bits: int) -> AffineWeight:
    best = _round_to_nearest(w_OGg, bits)
    least = _squared_error(w_OGg, best)
    for shrink in _SHRINKS:
        codes, scale, zero_point = _round_to_nearest(w_OGg, bits, shrink)
        centred = codes.float() - zero_point
        # The scale that fits these codes best; none does where all of them stand for 0.
        norm = centred.square().sum(-1, keepdim=True)
        fitted = (w_OGg * centred).sum(-1, keepdim=True) / norm.clamp(min=1)
        found = AffineWeight(codes, torch.where(fitted > 0, fitted, scale), zero_point)
        error = _squared_error(w_OGg, found)
        better = error < least
        pairs = zip(found, best, strict=True)
        best = AffineWeight(*(torch.where(better, new, old) for new, old in pairs))
        least = torch.where(better, error, least)
    return best


def _squared_error(w_OGg: torch.Tensor, weight: AffineWeight) -> torch.Tensor:
    centred = weight.codes.float() - weight.zero_point
    return (w_OGg - weight.weight_scale * centred).square().sum(-1, keepdim=True)


def centred_codes(
    packed: torch.Tensor, zero_point: torch.Tensor, layout: AffineLayout
) -> torch.Tensor:
    """Unpack codes ``[O, layout.num_bytes]`` and subtract zero points ``[O, G]``: ``[O, G, g]``.

    The dtype is int8 (int16 for 8 bits), or that of a floating-point ``zero_point``.
    """
    codes = unpack(packed, layout.bits, layout.num_codes)
    codes_OGg = codes.reshape(len(packed), layout.num_groups, layout.group_size)
    if zero_point.is_floating_point():
        return codes_OGg.to(zero_point.dtype).sub_(zero_point.unsqueeze(-1))
    signed = torch.int8 if layout.bits < 8 else torch.int16
    return codes_OGg.to(signed).sub_(zero_point.to(signed).unsqueeze(-1))


def centred_rows(
    packed: torch.Tensor, zero_point: torch.Tensor, layout: AffineLayout, dtype: torch.dtype
) -> torch.Tensor:
    """Decode rows of one group without their scale: whole numbers below 256, exact in bf16.

    ``packed`` is ``[O, layout.num_bytes]``, ``zero_point`` ``[O, 1]`` uint8; the result ``[O, I]``.
    """
    ones = torch.ones(1, device=packed.device).expand(len(packed), 1)
    if triton_decodes_affine(packed, ones, layout.bits, dtype):
        return dequantize_affine(packed, ones.contiguous(), zero_point, layout, dtype)
    if layout.bits == 8:
        centre = (zero_point ^ 128).view(torch.int8).to(dtype)  # z - 128; a byte is q - 128
        return packed.view(torch.int8).to(dtype).sub_(centre)
    return centred_codes(packed, zero_point, layout).squeeze(1).to(dtype)


def centred_groups(
    packed: torch.Tensor, zero_point: torch.Tensor, layout: AffineLayout, dtype: torch.dtype
) -> torch.Tensor:
    """Return :func:`centred_codes`, where Triton's kernels run as values of ``dtype``.

    A floating-point ``zero_point`` keeps its own. What fills the last group there is 0.
    """
    ones = torch.ones_like(zero_point, dtype=torch.float32)
    dtype = zero_point.dtype if zero_point.is_floating_point() else dtype
    if not triton_decodes_affine(packed, ones, layout.bits, dtype):
        return centred_codes(packed, zero_point, layout)
    return to_groups(dequantize_affine(packed, ones, zero_point, layout, dtype), layout.group_size)


def row_parts(num_rows: int, in_dim: int, weights_at_once: int | None = None) -> Iterator[slice]:
    """Yield slices of rows of at most ``weights_at_once`` (2^22) weights, but at least one row."""
    step = max(1, (weights_at_once or _WEIGHTS_AT_ONCE) // in_dim)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def dequantize_affine(
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor,
    layout: AffineLayout,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decode ``[O, I]``: ``weight_scale * (codes - zero_point)``, rounded once to ``dtype``.

    ``packed`` is ``[O, layout.num_bytes]`` uint8; ``weight_scale`` ``[O, G]``, fp32 or fp64;
    ``zero_point`` ``[O, G]``, uint8 or the dtype of ``weight_scale``.
    """
    if triton_decodes_affine(packed, weight_scale, layout.bits, dtype):
        from qst_tune.quantization.triton_decoding import decode_affine

        return decode_affine(packed, weight_scale, zero_point, layout, dtype)
    weight = torch.empty(len(packed), layout.in_dim, dtype=dtype, device=packed.device)
    for rows in row_parts(len(packed), layout.in_dim):
        centred_OGg = centred_codes(packed[rows], zero_point[rows], layout)
        scaled_OGg = centred_OGg * weight_scale[rows].unsqueeze(-1)
        weight[rows] = scaled_OGg.flatten(1)[:, : layout.in_dim]
    return weight
