"""NF4 and FP4 weights: torchao's 4-bit format, for any width, made and decoded quickly on a CPU.

torchao defines the format (QLoRA, https://arxiv.org/abs/2305.14314: 16 normal-float levels, one
absmax per 64 weights, those absmax values quantised again to 8 bits). This file adds block sizes
that fit every weight, two lookup tables that replace its slow and large loops bit for bit, the 16
levels of FP4, and the scalers of bitsandbytes, in the same bytes.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import torch
from torchao.dtypes.nf4tensor import NF4Tensor, SubclassTensorArgs, get_block_absmax, to_nf4

from qst_tune.quantization.affine import row_parts
from qst_tune.quantization.kernels import runs_triton

BLOCK_SIZE = 64
SCALER_BLOCK_SIZE = 256

QuantType = Literal["nf4", "fp4"]

# Weights decoded at once. glibc asks the system for each block of 32 MiB or more and gives it back
# page by page, which takes as long as the decoding itself.
_AT_ONCE = 2**22
# Scaled at once in another dtype: 1 MiB in fp32, which stays in the cache.
_SCALED_AT_ONCE = 2**18
# bitsandbytes' FP4 (1 bit sign, 2 exponent, 1 mantissa) in the order of its codes.
_FP4_LEVELS = [sign * size / 12 for sign in (1, -1) for size in (0, 0.0625, 8, 12, 4, 6, 2, 3)]


def nf4_block_sizes(numel: int) -> tuple[int, int]:
    """Return weights per absmax and absmax values per factor; both divide a weight evenly.

    torchao fixes 64 and 256, which refuses for example a 576 x 576 weight (SmolLM2): 5184 blocks.
    An odd number of elements is a ValueError, since a byte has two codes.
    """
    block_size = math.gcd(numel, BLOCK_SIZE)
    if numel == 0 or block_size % 2:
        raise ValueError(
            f"a weight of {numel} elements cannot be stored in 4 bits, two codes in a byte: use an "
            "even number of elements, or quantize_base=False"
        )
    return block_size, math.gcd(numel // block_size, SCALER_BLOCK_SIZE)


def quantize_nf4(weight: torch.Tensor, quant_type: QuantType = "nf4") -> NF4Tensor:
    """Quantise ``[out_dim, in_dim]`` to 4 bits with double quantisation: 0.52 bytes a weight.

    NF4 equals torchao's ``to_nf4`` exactly. FP4 is the same with the 16 levels of bitsandbytes.
    """
    weight = weight.detach().contiguous()
    block_size, scaler_block_size = nf4_block_sizes(weight.numel())
    if weight.is_meta:
        return _meta_nf4(weight, block_size, scaler_block_size)
    scalers, factors, mean = NF4Tensor.double_quantize_scalers(
        weight.flatten(), block_size, scaler_block_size
    )
    codes = nearest_levels(weight, block_size, quant_type)
    levels = levels_of_codes(weight.dtype, quant_type).to(weight.device, copy=True)
    # torchao's factors are a view that keeps one value a block alive: 6 % of the bytes for nothing.
    return nf4_from_parts(weight.shape, (scalers, factors.clone(), mean, codes, levels))


def dequantize_nf4(weight: NF4Tensor) -> torch.Tensor:
    """Decode an NF4 weight to its own dtype, bit for bit as torchao's ``get_original_weight``.

    A table of all 256 bytes gives two weights a lookup: on a CPU 0.5 instead of 3.3 ns a weight
    (2 cores, bf16). Indices are made for a part at a time; torchao's take up to 4 GiB for a weight
    of a 70B model.
    """
    if runs_triton(weight.quantized_data, weight.dtype):
        from qst_tune.quantization.triton_decoding import decode_nf4

        return decode_nf4(weight, absmax_unless_double_quantized(weight))
    # Where the codes are: an estimate's fake weight says that it is elsewhere.
    device = weight.quantized_data.device
    decoded = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    _decode(weight.quantized_data, absmax_of_blocks(weight), weight, out=decoded)
    return decoded


def decoded_rows(weight: NF4Tensor) -> Iterator[torch.Tensor]:
    """Yield rows of :func:`dequantize_nf4`, some at a time; all at once where blocks cross rows."""
    out_dim, in_dim = weight.shape
    parts = list(row_parts(out_dim, in_dim, _AT_ONCE))
    if len(parts) == 1 or in_dim % weight.block_size:
        yield dequantize_nf4(weight)
        return
    codes = weight.quantized_data.view(out_dim, -1)
    absmax = absmax_of_blocks(weight).view(out_dim, -1)
    for part in parts:
        decoded = torch.empty(
            part.stop - part.start, in_dim, dtype=weight.dtype, device=codes.device
        )
        _decode(codes[part].flatten(), absmax[part].flatten(), weight, out=decoded)
        yield decoded


def absmax_unless_double_quantized(weight: NF4Tensor) -> torch.Tensor | None:
    """Return the absmax of each block, or None where torchao's 8 bits encode it."""
    return None if weight.quantized_scalers.dtype == torch.int8 else absmax_of_blocks(weight)


def absmax_of_blocks(weight: NF4Tensor) -> torch.Tensor:
    """Largest absolute value of each block: torchao's 8 bits, bitsandbytes', or exact."""
    scalers: torch.Tensor = weight.quantized_scalers
    if scalers.is_floating_point():
        return scalers
    if scalers.dtype == torch.uint8:
        offset, numbers = weight.scaler_mean[0], weight.scaler_mean[1:]
        of_map = numbers[scalers.int()].view(-1, weight.scaler_block_size)
        scaled: torch.Tensor = of_map * weight.quantization_factor.unsqueeze(-1)
        decoded: torch.Tensor = scaled.flatten() + offset
        return decoded
    absmax: torch.Tensor = weight.dequantize_scalers(
        weight.quantized_scalers, weight.quantization_factor, weight.scaler_block_size
    )
    return absmax


def _decode(
    codes: torch.Tensor, absmax: torch.Tensor, weight: NF4Tensor, *, out: torch.Tensor
) -> None:
    """Decode a part of a weight, whole blocks of it, into ``out``."""
    table = _byte_to_pair(weight.nf4)
    pairs = out.view(-1).view(table.dtype)
    for start in range(0, codes.numel(), _AT_ONCE // 2):
        part = slice(start, start + _AT_ONCE // 2)
        # Whole pairs, seen as one integer each: the fastest gather on a CPU.
        torch.index_select(table, 0, codes[part].int(), out=pairs[part])
    _scale_blocks_(out.view(-1, weight.block_size), absmax)


def _scale_blocks_(blocks: torch.Tensor, absmax: torch.Tensor) -> None:
    """Multiply each block, in the wider dtype of the two; on a CPU a few blocks at once.

    There torch copies the whole to the wider dtype first: 8 million weights in bf16, with absmax in
    fp32, take 17 ms at once and 1.7 ms in parts (one core).
    """
    if blocks.device.type != "cpu" or blocks.dtype == absmax.dtype:
        blocks.mul_(absmax.unsqueeze(-1))
        return
    at_once = _SCALED_AT_ONCE // blocks.shape[1]
    for part, scale in zip(blocks.split(at_once), absmax.split(at_once), strict=True):
        part.copy_(part.to(scale.dtype).mul_(scale.unsqueeze(-1)))


def _byte_to_pair(levels: torch.Tensor) -> torch.Tensor:
    """``[256]`` integers, each the bits of the two levels that a byte of codes stands for."""
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=-1)
    as_one_integer = {2: torch.int32, 4: torch.int64}[levels.dtype.itemsize]
    return pairs.view(as_one_integer).squeeze(-1)


@lru_cache(maxsize=8)
def levels_of_codes(dtype: torch.dtype, quant_type: QuantType) -> torch.Tensor:
    """The 16 levels, those of NF4 as torchao rounds them to ``dtype``."""
    if quant_type == "fp4":
        return torch.tensor(_FP4_LEVELS, dtype=dtype)
    levels: torch.Tensor = to_nf4(torch.ones(64, dtype=dtype), 64, 1).nf4
    return levels


@lru_cache(maxsize=2)
def _bfloat16_to_code(quant_type: QuantType) -> torch.Tensor:
    """``[65536]`` uint8: the code of the nearest level to each bf16 value, indexed by its bits."""
    every_value = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    levels = levels_of_codes(torch.bfloat16, quant_type)
    table: torch.Tensor = NF4Tensor.quantize_tensor_nearest(every_value, levels).to(torch.uint8)
    return table


def nearest_levels(
    weight: torch.Tensor, block_size: int, quant_type: QuantType = "nf4"
) -> torch.Tensor:
    """Find the level nearest to each weight over its block's absmax: uint8 ``[numel / 2]``.

    The weight has whole blocks. On a CPU in bf16 this is one lookup, 40 times faster than torchao.
    """
    flat = weight.flatten()
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        levels = levels_of_codes(weight.dtype, quant_type).to(weight.device)
        num_blocks = flat.numel() // block_size
        packed: torch.Tensor = NF4Tensor.convert_to_norm_float_weight(
            flat, num_blocks, block_size, levels
        )
        return packed
    scaled = flat.view(-1, block_size) / get_block_absmax(flat, block_size).unsqueeze(-1)
    bits = scaled.flatten().view(torch.int16).int().bitwise_and_(0xFFFF)
    codes = torch.index_select(_bfloat16_to_code(quant_type), 0, bits)
    return codes[::2] << 4 | codes[1::2]


def _meta_nf4(weight: torch.Tensor, block_size: int, scaler_block_size: int) -> NF4Tensor:
    """The tensors of ``to_nf4`` without values; torchao's loop takes 20 s for a 70B model."""
    num_blocks = weight.numel() // block_size
    parts = (
        weight.new_empty(num_blocks, dtype=torch.int8),
        weight.new_empty(num_blocks // scaler_block_size),
        weight.new_empty(()),
        weight.new_empty(weight.numel() // 2, dtype=torch.uint8),
        weight.new_empty(16),
    )
    return nf4_from_parts(weight.shape, parts)


def nf4_from_parts(shape: Sequence[int], parts: Sequence[torch.Tensor]) -> NF4Tensor:
    """Make a weight of absmax codes, factors, mean, codes and levels, which give the dtype.

    uint8 absmax codes are bitsandbytes': their mean is followed by the 256 numbers of its map.
    Floating-point ones are the absmax values. Nothing is copied.
    """
    scalers, factors, *_, levels = parts
    num_blocks = len(scalers)
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    layout = SubclassTensorArgs(
        torch.Size(shape), strides, 0, levels.dtype, levels.device, requires_grad=False
    )
    block_size = math.prod(shape) // num_blocks
    return NF4Tensor(layout, block_size, num_blocks, num_blocks // max(1, len(factors)), *parts)
