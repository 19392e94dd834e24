r"""Triton kernels for the product of 1 to 16 tokens with a 4- or 8-bit weight: ``y = x W^T``.

The weight is decoded in registers, to the bits of ``triton_decoding.py``, and summed in fp32; it
never exists in memory. A program sums a few rows over every n-th tile of their bytes; the sums of
the n programs are added in a fixed order, so a product is the same each time.

Notation: M tokens, O rows, I columns, C bytes a row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.quantization.affine import AffineLayout
from qst_tune.quantization.triton_decoding import affine_values, nf4_parts, nf4_values

MOST_TOKENS = 16
# Tile of a program, half as many bytes in fp32 (41 or 49 KB of shared memory), and programs that
# keep a large GPU busy. Chosen on paper: not measured yet.
_ROWS, _BYTES = 16, 128
_PROGRAMS = 1024


@triton.jit
def _times(x, column, inside, weight, num_tokens, in_dim, TOKENS: tl.constexpr):
    """``[TOKENS, ROWS]``: columns of all tokens times a weight ``[ROWS, columns]``."""
    token = tl.arange(0, TOKENS)[:, None]
    mask = (token < num_tokens) & inside[None, :]
    x_MC = tl.load(x + token * in_dim + column[None, :], mask=mask, other=0)
    weight = weight.to(x_MC.dtype)
    if TOKENS == 1:
        return tl.sum(weight.to(tl.float32) * x_MC.to(tl.float32), axis=1)[None, :]
    return tl.dot(x_MC, tl.trans(weight), input_precision="ieee")


@triton.jit
def _store(sums, total, row, num_tokens, out_dim, TOKENS: tl.constexpr):
    token = tl.program_id(1) * num_tokens + tl.arange(0, TOKENS)[:, None]
    mask = (tl.arange(0, TOKENS)[:, None] < num_tokens) & (row[None, :] < out_dim)
    tl.store(sums + token * out_dim + row[None, :], total, mask=mask)


@triton.jit
def _nf4_product(
    x, codes, scalers, factors, mean, levels, sums, num_tokens, out_dim, in_dim,
    BLOCK: tl.constexpr, SCALERS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    row_bytes = in_dim // 2
    for start in range(tl.program_id(1) * BYTES, row_bytes, SPLITS * BYTES):
        byte = start + tl.arange(0, BYTES)
        inside = byte < row_bytes
        high, low = nf4_values(
            codes, scalers, factors, mean, levels, row[:, None] * row_bytes + byte[None, :],
            (row[:, None] < out_dim) & inside[None, :], BLOCK, SCALERS,
        )  # fmt: skip
        total += _times(x, 2 * byte, inside, high, num_tokens, in_dim, TOKENS)
        total += _times(x, 2 * byte + 1, inside, low, num_tokens, in_dim, TOKENS)
    _store(sums, total, row, num_tokens, out_dim, TOKENS)


@triton.jit
def _affine_product(
    x, codes, weight_scale, zero_point, sums, num_tokens, out_dim, in_dim, row_bytes, num_groups,
    GROUP: tl.constexpr, BITS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for start in range(tl.program_id(1) * BYTES, row_bytes, SPLITS * BYTES):
        byte = start + tl.arange(0, BYTES)
        stored = (row[:, None] < out_dim) & (byte < row_bytes)[None, :]
        packed = tl.load(codes + row[:, None] * row_bytes + byte[None, :], mask=stored, other=0)
        for half in tl.static_range(8 // BITS):
            column = byte + half * row_bytes
            inside = (byte < row_bytes) & (column < in_dim)
            weight = affine_values(
                packed, half, weight_scale, zero_point, row[:, None], column[None, :],
                stored & inside[None, :], num_groups, GROUP, BITS,
            )  # fmt: skip
            total += _times(x, column, inside, weight, num_tokens, in_dim, TOKENS)
    _store(sums, total, row, num_tokens, out_dim, TOKENS)


def nf4_product(
    x: torch.Tensor, weight: NF4Tensor, absmax: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply a few tokens with an NF4 or FP4 weight.

    Args:
        x (torch.Tensor): ``[..., I]`` of at most 16 tokens, in the dtype of ``weight``.
        weight (NF4Tensor): ``[O, I]``, I even.
        absmax (torch.Tensor | None): as :func:`decode_nf4`'s.

    Returns:
        torch.Tensor: ``[..., O]`` in the dtype of ``x``.
    """
    parts, scalers = nf4_parts(weight, absmax)
    blocks = {"BLOCK": weight.block_size, "SCALERS": scalers}
    return _product(_nf4_product, x, parts, len(weight), [], blocks)


def affine_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor,
    layout: AffineLayout,
) -> torch.Tensor:
    """Multiply a few tokens, ``[..., I]``, with an integer weight of 4 or 8 bits."""
    sizes = [codes.shape[1], layout.num_groups]
    form = {"GROUP": layout.group_size, "BITS": layout.bits}
    parts = [codes, weight_scale, zero_point]
    return _product(_affine_product, x, parts, len(codes), sizes, form)


def _product(
    kernel: Any,
    x: torch.Tensor,
    parts: list[torch.Tensor],
    out_dim: int,
    sizes: list[int],
    form: dict[str, int],
) -> torch.Tensor:
    x_MI = x.reshape(-1, x.shape[-1]).contiguous()
    num_tokens, in_dim = x_MI.shape
    num_bytes = _BYTES if x.dtype.itemsize == 2 else _BYTES // 2
    row_tiles, byte_tiles = triton.cdiv(out_dim, _ROWS), triton.cdiv(in_dim, 2 * num_bytes)
    splits = min(byte_tiles, triton.next_power_of_2(triton.cdiv(_PROGRAMS, row_tiles)))
    sums = x.new_empty(splits, num_tokens, out_dim, dtype=torch.float32)
    tile = {"TOKENS": 1 if num_tokens == 1 else MOST_TOKENS, "ROWS": _ROWS, "BYTES": num_bytes}
    with torch.cuda.device_of(x):
        kernel[(row_tiles, splits)](
            x_MI, *parts, sums, num_tokens, out_dim, in_dim, *sizes, **form, **tile, SPLITS=splits
        )
    return sums.sum(0).to(x.dtype).view(*x.shape[:-1], out_dim)
