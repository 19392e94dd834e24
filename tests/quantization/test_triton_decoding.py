"""Triton's kernels decode to the bits of the tables: in the interpreter, and on a GPU if any."""

import logging

import pytest
import torch
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.quantization.affine import (
    AffineLayout,
    centred_codes,
    centred_groups,
    dequantize_affine,
    quantize_affine,
)
from qst_tune.quantization.kernels import passes_trial
from qst_tune.quantization.nf4 import (
    absmax_unless_double_quantized,
    dequantize_nf4,
    nf4_from_parts,
    quantize_nf4,
)
from qst_tune.quantization.packing import pack
from tests.support.triton_compiler import compile_with_triton

pytest.importorskip("triton")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Blocks of 64 and 256; a row that ends within a block; one block; rows of LLaMA-2-7B's MLP.
SHAPES = [(64, 256), (12, 576), (36, 50), (1, 2), (37, 64), (1, 11008)]
ROWS = [(5, 576), (7, 50), (1, 2), (3, 4096)]  # a program each


@pytest.fixture(autouse=True)
def large_parts(monkeypatch: pytest.MonkeyPatch, triton_device: str) -> None:
    """The interpreter takes 10 ms a program, whatever its size."""
    if triton_device == "cpu":
        name = "qst_tune.quantization.triton_decoding._BYTES_AT_ONCE"
        monkeypatch.setattr(name, 8192)


def decoded(weight: NF4Tensor, device: str) -> torch.Tensor:
    from qst_tune.quantization.triton_decoding import decode_nf4

    parts = ("quantized_scalers", "quantization_factor", "scaler_mean", "quantized_data", "nf4")
    moved = nf4_from_parts(weight.shape, [getattr(weight, part).to(device) for part in parts])
    return decode_nf4(moved, absmax_unless_double_quantized(moved)).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_weight_of_4_bit_levels_is_torchaos_to_the_bit(
    shape, dtype, quant_type, triton_device
):
    weight = quantize_nf4((torch.randn(shape) * 0.02).to(dtype), quant_type)
    actual = decoded(weight, triton_device)
    assert (actual.dtype, actual.shape) == (dtype, weight.shape)
    assert torch.equal(actual, weight.get_original_weight())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.1, -0.3])
def test_a_constant_weight_whose_factors_are_infinite_decodes_to_itself(
    value, dtype, triton_device
):
    weight = torch.full((64, 64), value, dtype=dtype)
    assert torch.equal(decoded(quantize_nf4(weight), triton_device), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_map", [True, False])
def test_scalers_of_other_programs_decode_as_the_tables_do(has_map, dtype, triton_device):
    """bitsandbytes' 8-bit map, and absmax values in fp32."""
    own = quantize_nf4(torch.randn(64, 256).to(dtype))
    blocks = own.numel() // own.block_size
    scalers = torch.randint(256, (blocks,), dtype=torch.uint8) if has_map else torch.rand(blocks)
    parts = [scalers, torch.rand(blocks // 64), torch.randn(257), own.quantized_data, own.nf4]
    weight = nf4_from_parts(own.shape, parts)
    assert torch.equal(decoded(weight, triton_device), dequantize_nf4(weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 32), (4, None), (4, 64), (4, 48)])
@pytest.mark.parametrize("trained_zero", [True, False])
def test_every_integer_weight_is_the_tables_to_the_bit(
    shape, dtype, bits, group_size, trained_zero, triton_device
):
    from qst_tune.quantization.triton_decoding import decode_affine

    layout = AffineLayout(bits, min(group_size or shape[1], shape[1]), shape[1])
    codes, scale, zero_point = quantize_affine(
        torch.randn(shape), bits=bits, group_size=layout.group_size
    )
    zero_point = zero_point + torch.rand(zero_point.shape) if trained_zero else zero_point
    parts = [pack(codes, bits), scale, zero_point]
    on_device = [part.to(triton_device) for part in parts]
    actual = decode_affine(*on_device, layout, dtype).cpu()
    assert torch.equal(actual, dequantize_affine(*parts, layout, dtype))


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qst_tune.quantization import triton_decoding as decoding

def ptx(kernel, sizes, **constants):
    float_ = "*" + sys.argv[1]
    types = dict.fromkeys(kernel.arg_names, float_) | dict.fromkeys(sizes.split(), "i32")
    types |= {"codes": "*u8", "scalers": "*i8", "weight_scale": "*fp32", "zero_point": "*u8"}
    types |= dict.fromkeys(constants, "constexpr")
    types = {name: types[name] for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", 90, 32)
    return compile(ASTSource(kernel, types, values), target=target).asm["ptx"]

nf4, affine = {"BLOCK": 64, "SCALERS": 256}, {"GROUP": 64, "BITS": 4}
text = ptx(decoding._decode_nf4, "num_bytes", BYTES=1024, **nf4)
assert "div.rn.f32" in text and "div.full" not in text and "fma" not in text
text = ptx(decoding._decode_affine, "row_bytes in_dim num_groups", BYTES=1024, **affine)
assert "fma" not in text
"""


@pytest.mark.parametrize("zero_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "in_dim"), [(4, 160), (8, 160), (4, 100), (3, 96)])
def test_codes_minus_zero_points_are_those_of_the_tables(
    bits, in_dim, dtype, zero_dtype, monkeypatch, triton_device
):
    """For the gradient of PEQA's scales; 100 columns do not fill their last group of 64."""
    layout = AffineLayout(bits, 64, in_dim)
    codes, _, zero = quantize_affine(torch.randn(5, in_dim), bits=bits, group_size=64)
    packed, zero = pack(codes, bits).to(triton_device), zero.to(triton_device, zero_dtype)
    if zero_dtype.is_floating_point:
        zero += 0.37
    expected = centred_codes(packed, zero, layout)
    monkeypatch.setattr("qst_tune.quantization.kernels._runs_triton_on", lambda _: True)
    found = centred_groups(packed, zero, layout, dtype)
    if bits in (4, 8):
        assert found.dtype == (zero_dtype if zero_dtype.is_floating_point else dtype)
    assert found.shape == expected.shape
    columns = slice(None, in_dim)
    assert torch.equal(
        found.flatten(1)[:, columns], expected.flatten(1)[:, columns].to(found.dtype)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_kernels_compile_for_an_h100_and_no_two_roundings_become_one(dtype, tmp_path):
    """Triton needs no GPU for that. A division that is not IEEE, or an fma, would change bits."""
    compile_with_triton(COMPILE, tmp_path, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_decodes_a_whole_weight_of_7b_by_these_kernels_to_the_bit(dtype, monkeypatch):
    weight = quantize_nf4(torch.randn(11008, 4096, dtype=dtype, device="cuda"))
    actual = dequantize_nf4(weight)
    assert torch.equal(actual, weight.get_original_weight())
    monkeypatch.setattr("qst_tune.quantization.nf4.runs_triton", lambda *_: False)
    assert torch.equal(actual, dequantize_nf4(weight))


pytest.importorskip("triton")


def test_our_kernels_pass(triton_device):
    state = torch.get_rng_state()
    assert passes_trial(triton_device)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kernel", ["decode_nf4", "decode_affine"])
def test_one_value_that_differs_is_found_and_logged(kernel, triton_device, monkeypatch, caplog):
    from qst_tune.quantization import triton_decoding

    own = getattr(triton_decoding, kernel)

    def wrong(*args):
        weight = own(*args)
        weight[3, 5] += 0.01
        return weight

    monkeypatch.setattr(triton_decoding, kernel, wrong)
    with caplog.at_level(logging.WARNING):
        assert not passes_trial(triton_device)
    assert "are decoded to other values" in caplog.text


def test_a_kernel_that_does_not_compile_is_one_line(triton_device, monkeypatch, caplog):
    from qst_tune.quantization import triton_decoding

    def fail(*args):
        raise RuntimeError("ptxas failed\nand much more")

    monkeypatch.setattr(triton_decoding, "decode_affine", fail)
    with caplog.at_level(logging.WARNING):
        assert not passes_trial(triton_device)
    assert "ptxas failed" in caplog.text
    assert "much more" not in caplog.text
