"""FP8 weights decode to the numbers that a literal writer drew."""

import pytest
import torch

from qst_tune.quantization.float_formats import decode_float8, read_mxfp4
from qst_tune.quantization.nf4 import dequantize_nf4
from tests.reference import stored_formats as formats


@pytest.mark.parametrize("shape", [(128, 128), (192, 130), (5, 7)])
@pytest.mark.parametrize("block", [128, 48])
def test_blocks_are_decoded_also_where_the_last_is_not_full(shape, block: int) -> None:
    parts, dense = formats.float8(*shape, torch.Generator().manual_seed(0), block=block)
    decoded = decode_float8(parts["weight"], parts["weight_scale_inv"], (block, block))
    assert torch.equal(decoded, dense)


def test_one_scale_a_channel_or_a_weight() -> None:
    parts, dense = formats.float8(12, 20, torch.Generator().manual_seed(0), block=None)
    weight, scale = parts["weight"], parts["weight_scale_inv"]
    assert torch.equal(decode_float8(weight, scale), dense)
    assert torch.equal(decode_float8(weight, scale.squeeze(1)), dense)
    assert torch.equal(decode_float8(weight, torch.tensor(0.5)), weight.float() * 0.5)


def test_scales_of_another_shape_are_refused() -> None:
    weight = torch.zeros(192, 128).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"scales \(1, 2\) are not those of \(192, 128\)"):
        decode_float8(weight, torch.ones(1, 2), (128, 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_taken_over_exactly_in_bf16_too(dtype: torch.dtype) -> None:
    parts, dense = formats.mxfp4((1, 24, 96), torch.Generator().manual_seed(0))
    weight = read_mxfp4(parts["blocks"][0], parts["scales"][0]).nf4(dtype)
    assert weight.dtype == dtype
    assert torch.equal(dequantize_nf4(weight).float(), dense[0].T)


@pytest.mark.parametrize("exponent", [2, 250])
def test_the_smallest_and_largest_exponents_are_exact(exponent: int) -> None:
    """Beyond these, bf16 itself ends."""
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16)
    stored = read_mxfp4(blocks, torch.full((16, 1), exponent, dtype=torch.uint8))
    levels = torch.tensor(formats.MXFP4_LEVELS, dtype=torch.float64)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(1).long()
    expected = (levels[codes] * 2.0 ** (exponent - 127)).to(torch.bfloat16)
    assert torch.equal(stored.dense(torch.bfloat16), expected)
    assert torch.equal(dequantize_nf4(stored.nf4(torch.bfloat16)), expected)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1, 16\) codes with \(3, 1\) exponents"):
        read_mxfp4(torch.zeros(2, 1, 16, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.uint8))
