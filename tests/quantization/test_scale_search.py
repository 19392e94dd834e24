"""The searched scales lose the least: against all levels of all scales, tried in fp64."""

import pytest
import torch
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.quantization.nf4 import dequantize_nf4, quantize_nf4
from qst_tune.quantization.scale_search import FACTORS, quantize_nf4_weighed, searched_scales

INNER = ("quantized_scalers", "quantization_factor", "scaler_mean", "quantized_data", "nf4")
SHAPES = [(64, 192), (36, 50), (9, 64)]  # blocks of 64, of 8 across rows, one a row
TYPES = ["nf4", "fp4"]
DTYPES = [torch.float32, torch.bfloat16]


def drawn(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and mean squares of inputs that differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.03 * torch.randn(shape, generator=generator)
    return weight.to(dtype), torch.randn(shape[1], generator=generator).square() ** 2 + 1e-4


def importance_of_weights(weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    return importance.double().expand(weight.shape)


def errors_of_all_scales(
    weight: torch.Tensor, importance: torch.Tensor, plain: NF4Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[blocks, factors]``: the scales, and their errors with the best of all levels."""
    blocks = weight.double().view(-1, plain.block_size)
    weighing = importance_of_weights(weight, importance).reshape(blocks.shape)
    scales = blocks.abs().amax(1, keepdim=True) * torch.tensor(FACTORS, dtype=torch.float64)
    decoded = scales[:, :, None] * plain.nf4.double()
    distances = (blocks[:, None, :, None] - decoded[:, :, None]).square().amin(-1)
    return scales, (distances * weighing[:, None]).sum(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_blocks_scale_is_the_best_of_all(shape, quant_type, dtype):
    weight, importance = drawn(shape, dtype)
    scales, errors = errors_of_all_scales(weight, importance, quantize_nf4(weight, quant_type))
    ours = searched_scales(weight, importance, quant_type).double()
    place = (scales - ours[:, None]).abs().argmin(1, keepdim=True)
    torch.testing.assert_close(ours, scales.gather(1, place).squeeze(1), rtol=1e-6, atol=0)
    # The grid of places may miss the nearest level of a number in the middle of two.
    torch.testing.assert_close(errors.gather(1, place), errors.amin(1, True), rtol=1e-3, atol=0)
    assert len(place.unique()) > 5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_weight_takes_the_level_nearest_to_it_over_the_decoded_scale(shape, quant_type, dtype):
    weight, importance = drawn(shape, dtype)
    ours = quantize_nf4_weighed(weight, importance, quant_type)
    scales = ours.dequantize_scalers(
        ours.quantized_scalers, ours.quantization_factor, ours.scaler_block_size
    )
    codes = torch.stack([ours.quantized_data >> 4, ours.quantized_data & 15], dim=1).flatten()
    levels = ours.nf4.double()
    scaled = weight.double().view(-1, ours.block_size) / scales.double().unsqueeze(1)
    distances = (scaled.clamp(-2, 2).view(-1, 1) - levels).abs()
    taken = distances.gather(1, codes.long().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(taken, distances.amin(1), rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", [(192, 576), *SHAPES])
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_an_ordinary_weight_of_the_same_layout_that_loses_less(shape, quant_type, dtype):
    weight, importance = drawn(shape, dtype)
    ours, plain = (
        quantize_nf4_weighed(weight, importance, quant_type),
        quantize_nf4(weight, quant_type),
    )
    for name in INNER:
        a, b = getattr(ours, name), getattr(plain, name)
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()), name
    for name in ("block_size", "n_blocks", "scaler_block_size"):
        assert getattr(ours, name) == getattr(plain, name), name
    assert (ours.dtype, ours.shape, ours.stride()) == (plain.dtype, plain.shape, plain.stride())
    assert torch.equal(dequantize_nf4(ours), ours.get_original_weight())

    def lost(quantized: NF4Tensor) -> torch.Tensor:
        error = dequantize_nf4(quantized).double() - weight.double()
        return (error.square() * importance_of_weights(weight, importance)).sum()

    assert lost(ours) < 0.75 * lost(plain)


def test_parts_give_the_same_as_the_whole(monkeypatch):
    weight, importance = drawn((36, 50), torch.float32)
    whole = quantize_nf4_weighed(weight, importance)
    monkeypatch.setattr("qst_tune.quantization.scale_search._AT_ONCE", 120)
    parts = quantize_nf4_weighed(weight, importance)
    for name in INNER:
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("quant_type", TYPES)
def test_blocks_of_zeros_stay_zero_and_outliers_finite(dtype, quant_type):
    weight, importance = drawn((64, 192), dtype)
    weight[:8], weight[40, 3], weight[41] = 0, 1000, 2**-10
    decoded = dequantize_nf4(quantize_nf4_weighed(weight, importance, quant_type))
    assert not decoded[:8].any()
    assert decoded.isfinite().all()
    assert not dequantize_nf4(quantize_nf4_weighed(weight.new_zeros(64, 64), importance[:64])).any()


def test_a_constant_weight_decodes_to_itself():
    weight = torch.full((64, 64), -0.3)
    assert torch.equal(dequantize_nf4(quantize_nf4_weighed(weight, torch.ones(64))), weight)
