r"""Triton kernels that multiply a few tokens with a 4-bit weight, without decoding it to memory.

``one token``    each thread reads words of eight codes and adds in fp32; a block's sum is scaled by
                 its absmax
``1 to 16``      eight planes, one for each place in a word, are decoded and multiplied by tensor
                 cores; so are integers of 4 and 8 bits

.. math:: y_o = \sum_b a_{ob} \sum_{i \in b} L[q_{oi}]\, x_i

Codes, absmax a and levels L are those of :mod:`.triton_decoding`. The first kernel rounds nothing
before the end; the second rounds the weight as decoding does. Tiles of codes are two-dimensional
and everything else is in their layout: kernels that pass decoded values from thread to thread, as
those with a dimension for the place in a byte do, take ten times as long.

Notation: O rows, I columns, B tokens.
"""

from typing import NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.quantization.affine import AffineLayout
from qst_tune.quantization.few_tokens import MOST_TOKENS
from qst_tune.quantization.nf4 import absmax_unless_double_quantized

_BLOCK = 64  # columns that share an absmax
_CODES = 8  # in a word of 32 bits

Stored: TypeAlias = tuple[torch.Tensor, ...]
Constants: TypeAlias = dict[str, int]


class Tile(NamedTuple):
    """Rows and words of codes that a program reads at once, its warps, and how many share a row."""

    rows: int
    words: int
    warps: int
    parts: int = 1


VECTOR_TILES = (Tile(4, 256, 4), Tile(4, 128, 1))
MATRIX_TILES = (Tile(64, 32, 4, 4), Tile(64, 32, 4, 2), Tile(32, 64, 4, 4))


@triton.jit
def _absmax(scalers, factors, mean, block, inside, dtype: tl.constexpr, SCALERS: tl.constexpr):
    """Decode the absmax of blocks; ``SCALERS`` = 0: the scalers are absmax values."""
    absmax = tl.load(scalers + block, mask=inside, other=0).to(tl.float32)
    if SCALERS > 0:
        factor = tl.load(factors + block // SCALERS, mask=inside, other=0).to(tl.float32)
        centred = tl.div_rn(absmax, tl.where(inside, factor, 1.0)).to(dtype).to(tl.float32)
        absmax = (centred + tl.load(mean).to(tl.float32)).to(dtype).to(tl.float32)
    return absmax


@triton.jit
def _codes_and_absmax(
    codes, scalers, factors, mean, first, row, out_dim, row_words,
    dtype: tl.constexpr, SCALERS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Load words of rows from word ``first``: their numbers, their codes, and absmax by block."""
    word = first + tl.arange(0, WORDS)
    column = first // 8 + tl.arange(0, WORDS // 8)
    is_row, start = row[:, None] < out_dim, row[:, None].to(tl.int64)
    inside = is_row & (word[None, :] < row_words)
    bits = tl.load(codes + start * row_words + word[None, :], mask=inside, other=0)
    block = start * (row_words // 8) + column[None, :]
    is_block = is_row & (column[None, :] < row_words // 8)
    absmax = _absmax(scalers, factors, mean, block, is_block, dtype, SCALERS)
    # Of one dimension: then a look-up stays in its thread's layout.
    return word, tl.reshape(bits, [ROWS * WORDS]), absmax


@triton.jit
def _multiply_one(
    x, codes, scalers, factors, mean, levels, y, out_dim, row_words,
    SCALERS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = WORDS // 8
    table = tl.load(levels + tl.arange(0, 16)).to(tl.float32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCKS], tl.float32)
    for first in range(0, row_words, WORDS):
        word, flat, absmax = _codes_and_absmax(
            codes, scalers, factors, mean, first, row, out_dim, row_words,
            tl.bfloat16, SCALERS, ROWS, WORDS,
        )  # fmt: skip
        sums = tl.zeros([ROWS, WORDS], tl.float32)
        for byte in tl.static_range(4):
            pairs = tl.load(x + word * 4 + byte, mask=word < row_words, other=0)
            even = (pairs << 16).to(tl.float32, bitcast=True)
            odd = (pairs & -65536).to(tl.float32, bitcast=True)
            high = tl.gather(table, (flat >> (8 * byte + 4)) & 15, 0)
            low = tl.gather(table, (flat >> (8 * byte)) & 15, 0)
            sums += tl.reshape(high, [ROWS, WORDS]) * even[None, :]
            sums += tl.reshape(low, [ROWS, WORDS]) * odd[None, :]
        total += tl.sum(tl.reshape(sums, [ROWS, BLOCKS, 8]), 2) * absmax
    result = tl.sum(total, 1).to(tl.bfloat16)
    tl.store(y + row, result, mask=row < out_dim)


@triton.jit(do_not_specialize=["num_tokens"])
def _multiply_some(
    planes, codes, scalers, factors, mean, levels, y, out_dim, row_words, num_tokens,
    SCALERS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """``planes`` is x as ``[8, words, TOKENS]``: what belongs to one place in a word.

    ``y`` is fp32 ``[parts, num_tokens, O]``: each of the grid's parts sums some words of a row.
    """
    dtype: tl.constexpr = planes.dtype.element_ty
    BLOCKS: tl.constexpr = WORDS // 8
    table = tl.load(levels + tl.arange(0, 16)).to(tl.float32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    is_row = row[:, None] < out_dim
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    part_words = tl.cdiv(row_words, tl.num_programs(1) * WORDS) * WORDS
    begin = tl.program_id(1) * part_words
    for first in range(begin, tl.minimum(begin + part_words, row_words), WORDS):
        word, flat, absmax = _codes_and_absmax(
            codes, scalers, factors, mean, first, row, out_dim, row_words,
            dtype, SCALERS, ROWS, WORDS,
        )  # fmt: skip
        scale = tl.broadcast_to(absmax[:, :, None], [ROWS, BLOCKS, 8])
        scale = tl.reshape(scale, [ROWS, WORDS])
        for place in tl.static_range(8):
            shift = 8 * (place // 2) + 4 * (1 - place % 2)  # the high half of a byte is first
            level = tl.reshape(tl.gather(table, (flat >> shift) & 15, 0), [ROWS, WORDS])
            value = tl.load(
                planes + (place * row_words + word[:, None]) * TOKENS + token[None, :],
                mask=word[:, None] < row_words, other=0,
            )  # fmt: skip
            total = tl.dot((level * scale).to(dtype), value, total)
    place = (tl.program_id(1) * num_tokens + token[None, :]).to(tl.int64) * out_dim + row[:, None]
    tl.store(y + place, total, mask=is_row & (token[None, :] < num_tokens))


@triton.jit(do_not_specialize=["num_tokens"])
def _multiply_integers(
    planes, codes, weight_scale, zero_point, y, out_dim, row_words, num_groups, num_tokens,
    BITS: tl.constexpr, GROUP_WORDS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """As :func:`_multiply_some`; a word has four columns, and four more half a row behind.

    ``GROUP_WORDS`` are words that share a scale; 0: a row has one.
    """
    dtype: tl.constexpr = planes.dtype.element_ty
    HALVES: tl.constexpr = 8 // BITS
    GROUPS: tl.constexpr = WORDS // (GROUP_WORDS if GROUP_WORDS > 0 else WORDS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    is_row = row[:, None] < out_dim
    start = row[:, None].to(tl.int64)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    part_words = tl.cdiv(row_words, tl.num_programs(1) * WORDS) * WORDS
    begin = tl.program_id(1) * part_words
    if GROUP_WORDS == 0:
        scale = tl.load(weight_scale + start, mask=is_row, other=0)
        zero = tl.load(zero_point + start, mask=is_row, other=0).to(tl.float32)
    for first in range(begin, tl.minimum(begin + part_words, row_words), WORDS):
        word = first + tl.arange(0, WORDS)
        inside = is_row & (word[None, :] < row_words)
        bits = tl.load(codes + start * row_words + word[None, :], mask=inside, other=0)
        for half in tl.static_range(HALVES):
            if GROUP_WORDS > 0:
                group = first // GROUP_WORDS + tl.arange(0, GROUPS)
                is_group = is_row & (group[None, :] < num_groups // HALVES)
                place = start * num_groups + half * (num_groups // HALVES) + group[None, :]
                scale = tl.load(weight_scale + place, mask=is_group, other=0)
                zero = tl.load(zero_point + place, mask=is_group, other=0).to(tl.float32)
                scale = tl.broadcast_to(scale[:, :, None], [ROWS, GROUPS, GROUP_WORDS])
                zero = tl.broadcast_to(zero[:, :, None], [ROWS, GROUPS, GROUP_WORDS])
                scale, zero = tl.reshape(scale, [ROWS, WORDS]), tl.reshape(zero, [ROWS, WORDS])
            for byte in tl.static_range(4):
                code = (bits >> (8 * byte + BITS * half)) & (2**BITS - 1)
                if BITS == 8:
                    code = code ^ 128
                weight = (scale * (code.to(tl.float32) - zero)).to(dtype)
                plane = planes + (4 * half + byte) * row_words * TOKENS
                value = tl.load(
                    plane + word[:, None] * TOKENS + token[None, :],
                    mask=word[:, None] < row_words, other=0,
                )  # fmt: skip
                total = tl.dot(weight, value, total)
    place = (tl.program_id(1) * num_tokens + token[None, :]).to(tl.int64) * out_dim + row[:, None]
    tl.store(y + place, total, mask=is_row & (token[None, :] < num_tokens))


def takes_nf4(weight: NF4Tensor) -> bool:
    """Whether the kernels multiply with a weight: rows of whole blocks, in words from the start."""
    has_blocks = weight.block_size == _BLOCK and weight.shape[1] % _BLOCK == 0
    return bool(has_blocks and weight.quantized_data.data_ptr() % 16 == 0)


def multiply_nf4(x: torch.Tensor, weight: NF4Tensor, tile: Tile) -> torch.Tensor:
    """Multiply 1 to :data:`MOST_TOKENS` tokens, ``[B, I]`` to ``[B, O]``.

    One of the :data:`VECTOR_TILES` is for one token in bf16.
    """
    absmax = absmax_unless_double_quantized(weight)
    scalers = weight.quantized_scalers if absmax is None else absmax
    stored = (
        weight.quantized_data.view(torch.int32), scalers,
        weight.quantization_factor, weight.scaler_mean, weight.nf4,
    )  # fmt: skip
    constants = {
        "SCALERS": weight.scaler_block_size if absmax is None else 0,
        "ROWS": tile.rows, "WORDS": tile.words, "num_warps": tile.warps,
    }  # fmt: skip
    with torch.cuda.device_of(x):
        if tile in VECTOR_TILES:
            return _by_one(x, weight.shape[0], tile, stored, constants)
        return _by_some(x, weight.shape[0], tile, stored, constants)


def _by_one(
    x: torch.Tensor, out_dim: int, tile: Tile, stored: Stored, constants: Constants
) -> torch.Tensor:
    y: torch.Tensor = x.new_empty(1, out_dim)
    words = x.contiguous().view(torch.int32)
    grid = (triton.cdiv(out_dim, tile.rows),)
    _multiply_one[grid](words, *stored, y, out_dim, x.shape[1] // _CODES, **constants)
    return y


def _by_some(
    x: torch.Tensor, out_dim: int, tile: Tile, stored: Stored, constants: Constants
) -> torch.Tensor:
    num_tokens, row_words = len(x), x.shape[1] // _CODES
    planes = x.new_empty(_CODES, row_words, MOST_TOKENS)  # of more tokens than there are: anything
    planes[..., :num_tokens] = x.reshape(num_tokens, row_words, _CODES).permute(2, 1, 0)
    y = x.new_empty(tile.parts, num_tokens, out_dim, dtype=torch.float32)
    grid = (triton.cdiv(out_dim, tile.rows), tile.parts)
    _multiply_some[grid](
        planes, *stored, y, out_dim, row_words, num_tokens, TOKENS=MOST_TOKENS, **constants
    )
    total: torch.Tensor = y[0] if tile.parts == 1 else y.sum(0)
    return total.to(x.dtype)


def takes_integers(codes: torch.Tensor, zero_point: torch.Tensor, layout: AffineLayout) -> bool:
    """Whether :func:`multiply_integers` takes a weight: whole words, groups of whole tiles."""
    halves = 8 // layout.bits if layout.bits in (4, 8) else 0
    is_plain = halves > 0 and zero_point.dtype == torch.uint8
    if not is_plain or layout.num_codes != layout.in_dim or layout.in_dim % (16 * halves):
        return False
    is_grouped = layout.num_groups > 1
    if is_grouped and (layout.group_size not in (32, 64, 128) or layout.num_groups % halves):
        return False
    return codes.data_ptr() % 16 == 0


def multiply_integers(
    x: torch.Tensor,
    codes: torch.Tensor,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor,
    layout: AffineLayout,
    tile: Tile,
) -> torch.Tensor:
    """Multiply 1 to :data:`MOST_TOKENS` tokens, ``[B, I]`` to ``[B, O]``, with 4 or 8 bits.

    The others are those of :func:`~.affine.dequantize_affine`; ``tile`` is of
    :data:`MATRIX_TILES`.
    """
    num_tokens, out_dim, halves = len(x), len(codes), 8 // layout.bits
    row_words = codes.shape[1] // 4
    planes = x.new_empty(halves, 4, row_words, MOST_TOKENS)
    columns = x.reshape(num_tokens, halves, row_words, 4)
    planes[..., :num_tokens] = columns.permute(1, 3, 2, 0)
    y = x.new_empty(tile.parts, num_tokens, out_dim, dtype=torch.float32)
    grid = (triton.cdiv(out_dim, tile.rows), tile.parts)
    with torch.cuda.device_of(x):
        _multiply_integers[grid](
            planes, codes.view(torch.int32), weight_scale, zero_point, y,
            out_dim, row_words, layout.num_groups, num_tokens,
            BITS=layout.bits, GROUP_WORDS=layout.group_size // 4 if layout.num_groups > 1 else 0,
            TOKENS=MOST_TOKENS, ROWS=tile.rows, WORDS=tile.words, num_warps=tile.warps,
        )  # fmt: skip
    total: torch.Tensor = y[0] if tile.parts == 1 else y.sum(0)
    return total.to(x.dtype)
