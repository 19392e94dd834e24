"""Codes of a few bits each, several in a byte.

A row is cut into as many equal segments as codes share a group of bytes (4 bits: 2 codes a byte, 3
bits: 8 codes in 3 bytes, 2 bits: 4 codes a byte), and codes at the same place of each segment are
packed together: a few operations on whole segments, 0.4 ns a code on one CPU core, where the codes
of one byte side by side take 1 ns. An 8-bit code q is stored as the signed byte q - 128, which
integer matrix kernels read as it is.

Notation: O rows (output channels), I codes a row (input channels).
"""

import math

import torch


def packed_dim(in_dim: int, bits: int) -> int:
    """Return the bytes of a row of ``in_dim`` codes; its last group of bytes is padded."""
    num_codes, num_bytes = units_together(bits, 8)
    return math.ceil(in_dim / num_codes) * num_bytes


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes ``[O, I]``, each below ``2^bits``, to ``[O, packed_dim(I, bits)]``."""
    if bits == 8:
        return codes ^ 128
    num_rows, in_dim = codes.shape
    num_codes, _ = units_together(bits, 8)
    padded = torch.nn.functional.pad(codes, (0, -in_dim % num_codes))
    return pack_groups(padded.view(num_rows, num_codes, -1), bits, 8).view(num_rows, -1)


def unpack(packed: torch.Tensor, bits: int, in_dim: int) -> torch.Tensor:
    """Undo :func:`pack`, for all rows or some: ``[O, packed_dim(I, bits)]`` to ``[O, I]``."""
    if bits == 8:
        return (packed ^ 128)[:, :in_dim]
    _, num_bytes = units_together(bits, 8)
    codes = unpack_groups(packed.view(len(packed), num_bytes, -1), bits, 8)
    return codes.view(len(packed), -1)[:, :in_dim]


def units_together(bits: int, unit_bits: int) -> tuple[int, int]:
    """Return the smallest number of codes that fills whole bytes or words, and their number."""
    num_units = math.lcm(bits, unit_bits) // unit_bits
    return num_units * unit_bits // bits, num_units


def pack_groups(codes: torch.Tensor, bits: int, unit_bits: int) -> torch.Tensor:
    """Pack codes ``[N, codes, M]`` to bytes or words ``[N, units, M]``, the first one lowest."""
    _, num_units = units_together(bits, unit_bits)
    packed = codes.new_zeros(len(codes), num_units, codes.shape[2])
    for index in range(codes.shape[1]):
        unit, shift = divmod(index * bits, unit_bits)
        packed[:, unit] |= codes[:, index] << shift  # bits beyond the unit are dropped
        if shift + bits > unit_bits:
            packed[:, unit + 1] |= codes[:, index] >> (unit_bits - shift)
    return packed


def unpack_groups(packed: torch.Tensor, bits: int, unit_bits: int) -> torch.Tensor:
    """Undo :func:`pack_groups`, to uint8; ``packed`` is uint8, or int64 without a sign."""
    num_codes, _ = units_together(bits, unit_bits)
    shape = (len(packed), num_codes, packed.shape[2])
    codes = packed.new_empty(shape, dtype=torch.uint8)
    for index in range(num_codes):
        unit, shift = divmod(index * bits, unit_bits)
        code = packed[:, unit] >> shift
        if shift + bits > unit_bits:
            code |= packed[:, unit + 1] << (unit_bits - shift)
        torch.bitwise_and(code, 2**bits - 1, out=codes[:, index])
    return codes
