"""Our NF4 is torchao's, byte for byte, and our FP4 has the levels of bitsandbytes."""

import math

import pytest
import torch
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from qst_tune.quantization.nf4 import (
    decoded_rows,
    dequantize_nf4,
    nf4_block_sizes,
    quantize_nf4,
)

INNER = ("quantized_scalers", "quantization_factor", "scaler_mean", "quantized_data", "nf4")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(576, 576), (192, 576), (1536, 576), (36, 50), (64, 256), (1, 2)]


def assert_same_nf4(ours: NF4Tensor, theirs: NF4Tensor):
    assert ours.shape == theirs.shape
    assert ours.stride() == theirs.stride()
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
    assert not ours.requires_grad
    for name in ("block_size", "n_blocks", "scaler_block_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in INNER:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("std", [1.0, 0.02, 1e-3])
def test_every_byte_and_every_decoded_weight_equals_torchao(shape, dtype, std):
    weight = (torch.randn(shape) * std).to(dtype)
    theirs = to_nf4(weight, *nf4_block_sizes(weight.numel()))
    ours = quantize_nf4(weight)
    assert_same_nf4(ours, theirs)
    decoded = dequantize_nf4(ours)
    assert (decoded.dtype, decoded.shape) == (dtype, weight.shape)
    assert torch.equal(decoded, theirs.get_original_weight())


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_blocks_and_outliers_equal_torchao(dtype):
    weight = torch.randn(64, 256).to(dtype)
    weight[:8] = 0
    weight[40, 3] = 1000
    weight[41] = 2**-10
    ours, theirs = quantize_nf4(weight), to_nf4(weight)
    assert_same_nf4(ours, theirs)
    assert torch.equal(dequantize_nf4(ours), theirs.get_original_weight())


def test_every_bfloat16_value_gets_the_code_torchao_gives_it():
    """All 65536 bit patterns but NaN and infinity, each in a block whose absmax is 1."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[values.abs() <= 1].unsqueeze(1)
    weight = torch.cat([values, torch.ones_like(values)], dim=1)
    assert weight.numel() > 60_000
    assert_same_nf4(quantize_nf4(weight), to_nf4(weight, *nf4_block_sizes(weight.numel())))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -0.3])
@pytest.mark.parametrize("shape", [(64, 64), (36, 50)])
def test_a_constant_weight_decodes_to_itself(value, shape, dtype):
    """Every absmax equals their mean, so their second-level factor is infinite."""
    weight = torch.full(shape, value, dtype=dtype)
    assert torch.equal(dequantize_nf4(quantize_nf4(weight)), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_at_most_half_the_widest_gap_between_levels(dtype):
    """0.152 = (1 - 0.6962) / 2, the widest; 2 % on top for the 8-bit absmax."""
    weight = torch.randn(128, 256).to(dtype)
    error = (dequantize_nf4(quantize_nf4(weight)) - weight).float().view(-1, 64)
    absmax = weight.float().view(-1, 64).abs().amax(1, keepdim=True)
    assert (error.abs() / absmax).max() < 0.152 + 0.02


def test_quantising_leaves_the_weight_and_the_graph_alone():
    weight = torch.nn.Parameter(torch.randn(64, 64))
    before = weight.detach().clone()
    assert not quantize_nf4(weight).requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_transposed_weight_is_quantised_in_its_own_order(dtype):
    weight = torch.randn(96, 64).to(dtype)
    assert_same_nf4(quantize_nf4(weight.T), quantize_nf4(weight.T.contiguous()))


@pytest.mark.parametrize("at_once", [2, 200, 640, 10**6])
@pytest.mark.parametrize("shape", [(10, 128), (9, 64), (6, 96), (5, 50)])
def test_decoding_in_parts_gives_the_same(shape, at_once, monkeypatch):
    """Also where a part ends within a row, or a block does not end with one."""
    quantized = quantize_nf4(torch.randn(shape, dtype=torch.bfloat16))
    whole = dequantize_nf4(quantized)
    monkeypatch.setattr("qst_tune.quantization.nf4._AT_ONCE", at_once)
    assert torch.equal(dequantize_nf4(quantized), whole)
    rows = list(decoded_rows(quantized))
    assert torch.equal(torch.cat(rows), whole)
    if shape == (10, 128):
        assert [len(part) for part in rows] == {2: [1] * 10, 200: [1] * 10, 640: [5, 5]}.get(
            at_once, [10]
        )


def test_decoding_twice_gives_the_same_and_changes_nothing():
    """The lookup table is shared between calls and multiplied in place."""
    quantized = quantize_nf4(torch.randn(64, 64, dtype=torch.bfloat16))
    first = dequantize_nf4(quantized).clone()
    dequantize_nf4(quantized).zero_()
    assert torch.equal(dequantize_nf4(quantized), first)


@pytest.mark.parametrize("numel", [*range(2, 200, 2), 36 * 50, 576 * 576, 192 * 576, 1536 * 576])
def test_blocks_divide_any_even_number_of_weights(numel):
    block_size, scaler_block_size = nf4_block_sizes(numel)
    assert numel % (block_size * scaler_block_size) == 0
    assert block_size % 2 == 0
    for size, standard, total in (
        (block_size, 64, numel),
        (scaler_block_size, 256, numel // block_size),
    ):
        larger = [n for n in range(size + 1, standard + 1) if standard % n == total % n == 0]
        assert standard % size == 0
        assert not larger


@pytest.mark.parametrize("numel", [4096 * 4096, 11008 * 4096, 64 * 256])
def test_blocks_are_torchaos_own_wherever_those_fit(numel):
    assert nf4_block_sizes(numel) == (64, 256)


@pytest.mark.parametrize("numel", [0, 1, 35 * 3, 577 * 577])
def test_an_odd_number_of_weights_is_refused(numel):
    with pytest.raises(ValueError, match=f"{numel} elements cannot be stored in 4 bits"):
        nf4_block_sizes(numel)
    with pytest.raises(ValueError, match="quantize_base=False"):
        quantize_nf4(torch.zeros(1, numel))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_meta_the_inner_tensors_are_those_of_a_real_weight(shape, dtype):
    meta = quantize_nf4(torch.empty(shape, dtype=dtype, device="meta"))
    real = to_nf4(torch.randn(shape).to(dtype), *nf4_block_sizes(math.prod(shape)))
    assert meta.is_meta
    assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())
    for name in INNER:
        a, b = getattr(meta, name), getattr(real, name)
        assert a.is_meta, name
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name


def test_a_weight_takes_the_bytes_the_documentation_says():
    quantized = quantize_nf4(torch.randn(256, 1024, dtype=torch.bfloat16))
    num_bytes = sum(getattr(quantized, name).nbytes for name in INNER if name != "nf4")
    assert num_bytes / quantized.numel() == pytest.approx(0.52, abs=0.005)


# Where the CUDA kernels of bitsandbytes (dQuantizeFP4) pass from one code to the next.
FP4_PIVOTS = (
    (0.8333333, 3), (0.583333, 2), (0.4166667, 5), (0.29166667, 4),
    (0.20833333, 7), (0.0859375, 6), (0.00260417, 1), (-1, 0),
)  # fmt: skip
FP4_TWELFTHS = {0: 0, 1: 0.0625, 6: 2, 7: 3, 4: 4, 5: 6, 2: 8, 3: 12}


def fp4_of_bitsandbytes(x: float) -> tuple[int, float]:
    """Code and value of a number in [-1, 1]."""
    code = next(code for pivot, code in FP4_PIVOTS if abs(x) > pivot)
    return code | (8 if x < 0 else 0), math.copysign(FP4_TWELFTHS[code] / 12, x)


def test_every_fp4_code_and_value_is_that_of_bitsandbytes():
    """A grid that misses the pivots, in blocks whose absmax is 1 and so exact."""
    grid = (torch.arange(-2999, 3000, 2) + 0.3) / 3000
    weight = torch.stack([grid, torch.ones_like(grid)], dim=1)
    quantized = quantize_nf4(weight, "fp4")
    codes = torch.stack([quantized.quantized_data >> 4, quantized.quantized_data & 15], dim=1)
    expected = [[fp4_of_bitsandbytes(x) for x in row] for row in weight.tolist()]
    # Both zeros are zero; ours is always the positive one.
    wanted = torch.tensor([[0 if code == 8 else code for code, _ in row] for row in expected])
    assert torch.equal(codes, wanted)
    assert codes.unique().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15]
    values = torch.tensor([[value for _, value in row] for row in expected])
    torch.testing.assert_close(dequantize_nf4(quantized), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fp4_takes_the_nearest_level_of_each_block_and_decodes_as_torchao_does(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    quantized = quantize_nf4(weight, "fp4")
    scales = to_nf4(weight, *nf4_block_sizes(weight.numel()))  # absmax values as for NF4
    for name in ("quantized_scalers", "quantization_factor", "scaler_mean"):
        assert torch.equal(getattr(quantized, name), getattr(scales, name)), name
    blocks = weight.view(-1, quantized.block_size)
    scaled = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()
    levels = quantized.nf4
    assert levels.dtype == dtype
    codes = torch.stack([quantized.quantized_data >> 4, quantized.quantized_data & 15], dim=1)
    distance = (scaled - levels[codes.flatten().long()]).abs()
    assert torch.equal(distance, (scaled[:, None] - levels).abs().amin(1))
    assert torch.equal(dequantize_nf4(quantized), quantized.get_original_weight())
