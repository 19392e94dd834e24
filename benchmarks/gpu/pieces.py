"""Section ``pieces``: decoding of one weight and products with it, by our kernels and others'."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.backbones import DTYPE
from benchmarks.gpu.bench import Bench, Row, Run
from benchmarks.gpu.ours import without_triton
from qst_tune.modules.backbone_formats import BaseQuantization, quantize_linears
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.quantization.nf4 import dequantize_nf4

NF4, TABLES = "decode NF4", "decode NF4, tables"
OTHERS = ("decode NF4, bitsandbytes", "decode NF4, torchao", "decode NF4, torchao compiled")
FORMATS: tuple[BaseQuantization, ...] = ("fp4", "int8", "int4")
DECODINGS = (NF4, TABLES, *OTHERS, *(f"decode {name}" for name in FORMATS))
PRODUCTS = ("bf16", "NF4", "bitsandbytes NF4")


@torch.no_grad()
def pieces(bench: Bench) -> Iterator[Row]:
    """Measure decoding in every format, and products of few and many tokens."""
    out_dim, in_dim = bench.sizes.weight_shape
    shape = f"{out_dim} x {in_dim}"
    dense = bench.weights.dense(torch.Size((out_dim, in_dim)))
    linear = NF4Linear(dense)
    yield from _decoding(bench, shape, dense, linear)
    for num_tokens in bench.sizes.product_tokens:
        x = torch.randn(num_tokens, in_dim, device=bench.device, dtype=DTYPE)
        makers = (
            partial(partial, F.linear, x, dense),
            partial(partial, linear, x),
            partial(_bitsandbytes_product, x, dense),
        )
        names = (f"product of {num_tokens} tokens, {name}" for name in PRODUCTS)
        yield from bench.kernels("pieces", shape, dict(zip(names, makers, strict=True)))


def _decoding(bench: Bench, shape: str, dense: torch.Tensor, linear: NF4Linear) -> Iterator[Row]:
    """Decode to bf16; NF4 also as the tables and others do it."""
    weight: Any = linear.weight
    decoded = dequantize_nf4(weight)
    run = partial(dequantize_nf4, weight)
    with without_triton():
        is_equal = torch.equal(decoded, run())
    ours = {NF4: lambda: run}
    yield from bench.kernels("pieces", shape, ours, bit_equal_to_tables=is_equal)
    with without_triton():
        slow = list(bench.kernels("pieces", shape, {TABLES: lambda: run}))
    yield from slow
    others = (
        partial(_bitsandbytes_decoding, dense),
        lambda: weight.get_original_weight,
        lambda: torch.compile(lambda: weight.get_original_weight()),
    )
    yield from bench.kernels("pieces", shape, dict(zip(OTHERS, others, strict=True)))
    formats = {f"decode {name}": partial(_decoding_of, name, dense) for name in FORMATS}
    yield from bench.kernels("pieces", shape, formats)


def _decoding_of(name: BaseQuantization, dense: torch.Tensor) -> Run:
    linear = nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(dense, requires_grad=False)
    parent: Any = nn.Sequential(linear)
    quantize_linears(parent, name)
    return partial(parent[0].dense_weight, DTYPE)


def _bitsandbytes_decoding(dense: torch.Tensor) -> Run:
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    return partial(functional.dequantize_4bit, codes, state)


def _bitsandbytes_product(x: torch.Tensor, dense: torch.Tensor) -> Run:
    import bitsandbytes

    quantize = bitsandbytes.functional.quantize_4bit
    codes, state = quantize(dense, quant_type="nf4", compress_statistics=True)
    return partial(bitsandbytes.matmul_4bit, x, codes.t(), quant_state=state)
