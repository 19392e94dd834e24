"""bitsandbytes' weights decode to the numbers of an independent literal reader."""

import pytest
import torch

from qst_tune.quantization.bitsandbytes import read_bnb_4bit, read_bnb_8bit
from qst_tune.quantization.nf4 import decoded_rows, dequantize_nf4
from qst_tune.quantization.stored import stored_on
from tests.reference import stored_formats as formats

# Whole blocks; blocks that are no multiple of 256; a last block that is not full.
SHAPES = [(96, 128), (576, 576), (33, 34)]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scalers_are_taken_over_exactly(shape, quant_type: str, nested: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    parts, dense = formats.bnb_4bit(*shape, generator, quant_type=quant_type, nested=nested)
    stored = read_bnb_4bit(parts)
    weight = stored.nf4(torch.float32)
    assert torch.equal(dequantize_nf4(weight), dense)
    assert torch.equal(torch.cat(list(decoded_rows(weight))), dense)
    assert torch.equal(weight.quantized_data, parts["weight"].flatten())
    assert torch.equal(stored.dense(torch.bfloat16), dense.bfloat16())


def test_a_weight_in_bf16_is_within_the_rounding_of_bf16() -> None:
    parts, dense = formats.bnb_4bit(96, 128, torch.Generator().manual_seed(0))
    weight = dequantize_nf4(read_bnb_4bit(parts).nf4(torch.bfloat16))
    # The level and the product are rounded to bf16, each by 2^-8 at most.
    torch.testing.assert_close(weight.float(), dense, rtol=2 * 2**-8, atol=0)


def test_a_double_quantised_weight_takes_the_bytes_of_our_own() -> None:
    parts, _ = formats.bnb_4bit(256, 256, torch.Generator().manual_seed(0))
    weight = read_bnb_4bit(parts).nf4(torch.bfloat16)
    assert weight.quantized_data.numel() == 256 * 256 / 2
    assert weight.quantized_scalers.numel() * weight.quantized_scalers.itemsize == 256 * 256 / 64


def test_an_8_bit_weight_is_exact() -> None:
    parts, dense = formats.bnb_8bit(24, 40, torch.Generator().manual_seed(0))
    assert torch.equal(read_bnb_8bit(parts).dense(torch.float32), dense)


def test_a_stored_weight_can_be_moved() -> None:
    for write, read in ((formats.bnb_4bit, read_bnb_4bit), (formats.bnb_8bit, read_bnb_8bit)):
        parts, _ = write(24, 64, torch.Generator().manual_seed(0))
        moved = stored_on(read(parts), torch.device("meta"))
        assert moved.dense(torch.float32).shape == (24, 64)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    parts, _ = formats.bnb_4bit(24, 64, torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=r"700 bytes of torch.uint8 are no 4-bit codes of \(24, 64"
    ):
        read_bnb_4bit({**parts, "weight": torch.zeros(700, 1, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="3 absmax values are not those of"):
        read_bnb_4bit({**parts, "weight.absmax": parts["weight.absmax"][:3]})
    del parts["weight.quant_state.bitsandbytes__nf4"]
    with pytest.raises(ValueError, match="no quant_state of nf4 or fp4"):
        read_bnb_4bit(parts)
