r"""Triton kernels that decode 4- and 8-bit weights, to the bits of the table path.

NF4 and FP4, two codes a byte, the first in the high half; one absmax ``a`` for a block of codes,
itself stored as an int8 scaler ``s`` with a factor ``f`` for a block of scalers and one mean ``m``:

.. math:: w = \mathrm{rd}(L[q]\, a), \qquad a = \mathrm{rd}(\mathrm{rd}(s / f) + m)

Integers, a signed byte q - 128, or two codes a byte whose columns lie half a row apart
(``packing.py``):

.. math:: w = \mathrm{rd}(s_g (q - z_g))

where rd rounds fp32 to the weight's dtype. Each step is one IEEE operation, and no two of them can
be fused to one, so the results equal torch's.

Notation: O rows, I columns, C bytes a row, G groups a row.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.errors import first_line
from qst_tune.quantization.affine import AffineLayout, dequantize_affine, quantize_affine
from qst_tune.quantization.nf4 import dequantize_nf4, quantize_nf4
from qst_tune.quantization.packing import pack
from qst_tune.quantization.waves import waves

_BYTES_AT_ONCE = 1024


@triton.jit
def nf4_values(
    codes, scalers, factors, mean, levels, byte, inside, BLOCK: tl.constexpr, SCALERS: tl.constexpr
):
    """Decode the two values of each byte; ``SCALERS`` = 0: the scalers are absmax values."""
    dtype = levels.dtype.element_ty
    block = byte // (BLOCK // 2)
    absmax = tl.load(scalers + block, mask=inside, other=0).to(tl.float32)
    if SCALERS > 0:
        factor = tl.load(factors + block // SCALERS, mask=inside, other=0).to(tl.float32)
        centred = tl.div_rn(absmax, tl.where(inside, factor, 1.0)).to(dtype).to(tl.float32)
        absmax = (centred + tl.load(mean).to(tl.float32)).to(dtype).to(tl.float32)
    code = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
    high = tl.load(levels + (code >> 4)).to(tl.float32) * absmax
    low = tl.load(levels + (code & 15)).to(tl.float32) * absmax
    return high.to(dtype), low.to(dtype)


@triton.jit
def affine_values(
    packed, half, weight_scale, zero_point, row, column, inside, num_groups,
    GROUP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Decode a code of each byte, which belongs to these rows and columns, to fp32."""
    code = packed ^ 128 if BITS == 8 else (packed >> (half * BITS)) & (2**BITS - 1)
    group = row * num_groups + column // GROUP
    scale = tl.load(weight_scale + group, mask=inside, other=0)
    zero = tl.load(zero_point + group, mask=inside, other=0).to(tl.float32)
    return scale * (code.to(tl.float32) - zero)


@triton.jit
def _decode_nf4(
    codes, scalers, factors, mean, levels, weight, num_bytes,
    BLOCK: tl.constexpr, SCALERS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BYTES
    byte = start + tl.arange(0, BYTES)
    high, low = nf4_values(
        codes, scalers, factors, mean, levels, byte, byte < num_bytes, BLOCK, SCALERS
    )
    value = 2 * start + tl.arange(0, 2 * BYTES)
    tl.store(weight + value, tl.interleave(high, low), mask=value < 2 * num_bytes)


@triton.jit
def _decode_affine(
    codes, weight_scale, zero_point, weight, row_bytes, in_dim, num_groups,
    GROUP: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    packed = tl.load(codes + row * row_bytes + byte, mask=byte < row_bytes, other=0)
    for half in tl.static_range(8 // BITS):
        column = byte + half * row_bytes
        inside = (byte < row_bytes) & (column < in_dim)
        value = affine_values(
            packed, half, weight_scale, zero_point, row, column, inside, num_groups, GROUP, BITS
        )
        tl.store(weight + row * in_dim + column, value, mask=inside)


def decode_nf4(weight: NF4Tensor, absmax: torch.Tensor | None = None) -> torch.Tensor:
    """Decode an NF4 or FP4 weight; ``absmax`` None: torchao's int8 scalers encode it."""
    scalers = weight.quantized_scalers if absmax is None else absmax
    in_factor = weight.scaler_block_size if absmax is None else 0
    tensors = [scalers, weight.quantization_factor, weight.scaler_mean, weight.nf4]
    parts = [weight.quantized_data, *tensors]
    num_bytes = parts[0].numel()
    decoded = torch.empty(weight.shape, dtype=weight.dtype, device=parts[0].device)
    with torch.cuda.device_of(parts[0]):
        _decode_nf4[(triton.cdiv(num_bytes, _BYTES_AT_ONCE),)](
            *parts, decoded, num_bytes,
            BLOCK=weight.block_size, SCALERS=in_factor, BYTES=_BYTES_AT_ONCE,
        )  # fmt: skip
    return decoded


def decode_affine(
    codes: torch.Tensor,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor,
    layout: AffineLayout,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decode an integer weight of 4 or 8 bits; arguments as :func:`dequantize_affine`'s."""
    row_bytes = codes.shape[1]
    weight = torch.empty(len(codes), layout.in_dim, dtype=dtype, device=codes.device)
    with torch.cuda.device_of(codes):
        _decode_affine[(len(codes), triton.cdiv(row_bytes, _BYTES_AT_ONCE))](
            codes, weight_scale, zero_point, weight, row_bytes, layout.in_dim, layout.num_groups,
            GROUP=layout.group_size, BITS=layout.bits, BYTES=_BYTES_AT_ONCE,
        )  # fmt: skip
    return weight


_ROWS, _COLUMNS = 48, 320


@torch.no_grad()
def find_fault(device: str) -> str | None:
    """Return what is wrong with the kernels on this device, or None."""
    try:
        with torch.device("cpu"):
            return next(_faults(device), None)
    except Exception as error:  # of Triton's compiler, of the driver, of any kind
        return f"{type(error).__name__}: {first_line(error)}"


def _faults(device: str) -> Iterator[str]:
    dense = waves(_ROWS, _COLUMNS).mul_(0.05)
    weight = quantize_nf4(dense)
    found = decode_nf4(weight.to(device)).cpu()
    if not torch.equal(found, dequantize_nf4(weight)):
        yield "NF4 weights are decoded to other values"
    for bits in (4, 8):
        layout = AffineLayout(bits, 64, _COLUMNS)
        codes, scale, zero = quantize_affine(dense, bits=bits, group_size=64)
        packed = pack(codes, bits)
        decoded = dequantize_affine(packed, scale, zero, layout, dense.dtype)
        packed, scale, zero = packed.to(device), scale.to(device), zero.to(device)
        found = decode_affine(packed, scale, zero, layout, dense.dtype)
        if not torch.equal(found.cpu(), decoded):
            yield f"weights of {bits} bits are decoded to other values"
