"""Quantised weights written as the formats' documentation has them, bit by bit.

Each function draws codes, scales and zero points, and returns the tensors that a directory has of
one linear, and its dense weight ``[O, I]`` in fp32, computed from the drawn numbers alone.
"""

import json

import torch

Linear = tuple[dict[str, torch.Tensor], torch.Tensor]

NF4_LEVELS = [  # bitsandbytes/functional.py, get_4bit_type("nf4")
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
FP4_LEVELS = [
    sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
]
MXFP4_LEVELS = [
    sign * value for sign in (1, -1) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
]


def words(values: list[int], bits: int) -> list[int]:
    """32-bit words of a stream of numbers, the first in the lowest bits, as signed ones."""
    stream = sum(value << (bits * index) for index, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    unsigned = [(stream >> (32 * index)) & 0xFFFFFFFF for index in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


def pack_rows(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack each row of a matrix."""
    return torch.tensor([words(row, bits) for row in rows.tolist()], dtype=torch.int32)


def draw(out_dim: int, in_dim: int, groups: int, bits: int, generator: torch.Generator):
    """Codes ``[O, I]``, fp16 scales ``[O, G]`` and zero points ``[O, G]``."""
    codes = torch.randint(0, 2**bits, (out_dim, in_dim), generator=generator)
    scales = 0.01 + 0.02 * torch.rand(out_dim, groups, generator=generator)
    zeros = torch.randint(1, 2**bits, (out_dim, groups), generator=generator)
    return codes, (scales / 2 ** (bits - 4)).half(), zeros


def gptq(
    out_dim: int,
    in_dim: int,
    generator: torch.Generator,
    *,
    bits: int = 4,
    group_size: int = 32,
    form: str = "gptq",
    act_order: bool = False,
    sym: bool = False,
) -> Linear:
    size = in_dim if group_size == -1 else group_size
    groups = -(-in_dim // size)
    codes, scales, zeros = draw(out_dim, in_dim, groups, bits, generator)
    if sym:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    g_idx = torch.arange(in_dim) // size
    if act_order:
        g_idx = g_idx[torch.randperm(in_dim, generator=generator)]
    dense = scales.float()[:, g_idx] * (codes - zeros[:, g_idx])
    stored = zeros - 1 if form == "gptq" else zeros
    tensors = {
        "qweight": pack_rows(codes, bits).T.contiguous(),
        "qzeros": pack_rows(stored.T, bits),
        "scales": scales.T.contiguous(),
        "g_idx": g_idx.int(),
    }
    return tensors, dense


def awq(out_dim: int, in_dim: int, generator: torch.Generator, *, group_size: int = 32) -> Linear:
    groups = in_dim // group_size
    codes, scales, zeros = draw(out_dim, in_dim, groups, 4, generator)
    g_idx = torch.arange(in_dim) // group_size
    dense = scales.float()[:, g_idx] * (codes - zeros[:, g_idx])

    def packed(matrix: torch.Tensor) -> torch.Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        in_order = matrix.view(len(matrix), -1, 8)[:, :, order].flatten(1)
        return pack_rows(in_order, 4)

    tensors = {
        "qweight": packed(codes.T.contiguous()),
        "qzeros": packed(zeros.T.contiguous()),
        "scales": scales.T.contiguous(),
    }
    return tensors, dense


def pack_quantized(
    out_dim: int,
    in_dim: int,
    generator: torch.Generator,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
) -> Linear:
    groups = in_dim // group_size
    codes, scales, zeros = draw(out_dim, in_dim, groups, bits, generator)
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    dense = (codes - zeros.repeat_interleave(group_size, 1)).float()
    dense = dense * scales.float().repeat_interleave(group_size, 1)
    tensors = {
        "weight_packed": pack_rows(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([out_dim, in_dim]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_rows(zeros.T, bits).T.contiguous()
    return tensors, dense


def int_quantized(out_dim: int, in_dim: int, generator: torch.Generator) -> Linear:
    weight = torch.randint(-127, 128, (out_dim, in_dim), generator=generator)
    scale = 0.001 + 0.001 * torch.rand(out_dim, 1, generator=generator)
    return {"weight": weight.to(torch.int8), "weight_scale": scale}, weight * scale


def bnb_8bit(out_dim: int, in_dim: int, generator: torch.Generator) -> Linear:
    weight = torch.randint(-127, 128, (out_dim, in_dim), generator=generator)
    largest = 0.1 + torch.rand(out_dim, generator=generator)
    return {"weight": weight.to(torch.int8), "SCB": largest}, weight * (largest[:, None] / 127)


def bnb_4bit(
    out_dim: int,
    in_dim: int,
    generator: torch.Generator,
    *,
    quant_type: str = "nf4",
    nested: bool = True,
) -> Linear:
    numel = out_dim * in_dim
    codes = torch.randint(0, 16, (numel,), generator=generator)
    blocks = -(-numel // 64)
    levels = torch.tensor(NF4_LEVELS if quant_type == "nf4" else FP4_LEVELS)
    state = {"quant_type": quant_type, "blocksize": 64, "dtype": "float16"}
    state["shape"] = [out_dim, in_dim]
    tensors = {"weight": (codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None]}
    tensors["weight.quant_map"] = levels
    if nested:
        absmax_codes = torch.randint(0, 256, (blocks,), generator=generator)
        numbers = torch.rand(256, generator=generator).mul(2).sub(1).sort().values
        factors = 0.02 + 0.02 * torch.rand(-(-blocks // 256), generator=generator)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.08}
        absmax = numbers[absmax_codes] * factors[torch.arange(blocks) // 256] + 0.08
        tensors["weight.absmax"] = absmax_codes.to(torch.uint8)
        tensors["weight.nested_absmax"] = factors
        tensors["weight.nested_quant_map"] = numbers
    else:
        absmax = 0.05 + 0.1 * torch.rand(blocks, generator=generator)
        tensors["weight.absmax"] = absmax
    text = json.dumps(state).encode()
    name = f"weight.quant_state.bitsandbytes__{quant_type}"
    tensors[name] = torch.tensor(list(text), dtype=torch.uint8)
    dense = levels[codes] * absmax[torch.arange(numel) // 64]
    return tensors, dense.view(out_dim, in_dim)


def float8(
    out_dim: int,
    in_dim: int,
    generator: torch.Generator,
    *,
    block: int | None = 48,
    name: str = "weight_scale_inv",
) -> Linear:
    weight = torch.randn(out_dim, in_dim, generator=generator).to(torch.float8_e4m3fn)
    if block is None:
        scale = 0.02 + 0.02 * torch.rand(out_dim, 1, generator=generator)
        return {"weight": weight, name: scale}, weight.float() * scale
    shape = (-(-out_dim // block), -(-in_dim // block))
    scale = 0.02 + 0.02 * torch.rand(shape, generator=generator)
    rows, columns = torch.arange(out_dim) // block, torch.arange(in_dim) // block
    return {"weight": weight, name: scale}, weight.float() * scale[rows][:, columns]


def mxfp4(shape: tuple[int, ...], generator: torch.Generator) -> Linear:
    """Experts ``[E, O, I]``; the dense weight is ``[E, I, O]``, as gpt-oss has it."""
    codes = torch.randint(0, 16, shape, generator=generator)
    exponents = torch.randint(118, 124, (*shape[:-1], shape[-1] // 32), generator=generator)
    levels = torch.tensor(MXFP4_LEVELS)[codes]
    dense = levels * torch.pow(2.0, exponents - 127.0).repeat_interleave(32, -1)
    blocks = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
    blocks = blocks.unflatten(-1, (-1, 16))
    return {"blocks": blocks, "scales": exponents.to(torch.uint8)}, dense.transpose(1, 2)
