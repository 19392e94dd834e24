"""FP8 weights decode to the numbers that a literal writer drew."""

import pytest
import torch

from qst_tune.quantization.float8 import decode_float8
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
