"""Triton's products of few tokens are those of the decoded weight."""

import pytest
import torch

from qst_tune.quantization.affine import AffineLayout, dequantize_affine, quantize_affine
from qst_tune.quantization.nf4 import dequantize_nf4, nf4_from_parts, quantize_nf4
from qst_tune.quantization.packing import pack

pytest.importorskip("triton")
# One program, rows and bytes that do not fill a tile, and several programs that share a row.
SHAPES = [(16, 64), (37, 50), (20, 1120)]
# Sums of a thousand in another order, over the largest output; then rounded once.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def skip_what_the_interpreter_gets_wrong(dtype: torch.dtype, num_tokens: int, device: str) -> None:
    if (dtype, device) == (torch.bfloat16, "cpu") and num_tokens > 1:
        pytest.skip("Triton's interpreter multiplies matrices in bf16 as if they were integers")


def assert_product(y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> None:
    expected = x.double() @ dense.double().T
    assert (y.dtype, y.shape) == (x.dtype, expected.shape)
    error = (y.cpu().double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCES[x.dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_levels(shape, dtype, num_tokens, quant_type, triton_device):
    from qst_tune.quantization.triton_products import nf4_product

    skip_what_the_interpreter_gets_wrong(dtype, num_tokens, triton_device)
    weight = quantize_nf4((torch.randn(shape) * 0.02).to(dtype).to(triton_device), quant_type)
    x = torch.randn(1, num_tokens, shape[1]).to(dtype)
    assert_product(nf4_product(x.to(triton_device), weight), x, dequantize_nf4(weight).cpu())


@pytest.mark.parametrize("num_tokens", [1, 16])
def test_4_bit_levels_with_exact_absmax(num_tokens, triton_device):
    from qst_tune.quantization.triton_products import nf4_product

    own = quantize_nf4(torch.randn(32, 128))
    absmax = torch.rand(own.numel() // own.block_size)
    parts = [absmax, torch.ones(1), torch.ones(1), own.quantized_data, own.nf4]
    weight = nf4_from_parts(own.shape, [part.to(triton_device) for part in parts])
    x = torch.randn(num_tokens, 128)
    y = nf4_product(x.to(triton_device), weight, absmax.to(triton_device))
    assert_product(y, x, dequantize_nf4(weight).cpu())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", [1, 16])
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 64), (4, 48)])
def test_integers(shape, dtype, num_tokens, bits, group_size, triton_device):
    from qst_tune.quantization.triton_products import affine_product

    skip_what_the_interpreter_gets_wrong(dtype, num_tokens, triton_device)
    layout = AffineLayout(bits, min(group_size or shape[1], shape[1]), shape[1])
    codes, scale, zero_point = quantize_affine(
        torch.randn(shape), bits=bits, group_size=layout.group_size
    )
    parts = [pack(codes, bits), scale, zero_point]
    x = torch.randn(num_tokens, shape[1]).to(dtype)
    y = affine_product(x.to(triton_device), *(part.to(triton_device) for part in parts), layout)
    assert_product(y, x, dequantize_affine(*parts, layout, dtype))
