"""A quantised tensor is its parts, and can be put together of them."""

import pytest
import torch

from qst_tune.quantization.nf4 import QuantType, dequantize_nf4, quantize_nf4
from qst_tune.quantization.parts import join_parts, parts_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_joined_parts_are_the_weight_also_where_the_pattern_is_on_meta(
    quant_type: QuantType, dtype: torch.dtype
) -> None:
    weight = quantize_nf4(torch.randn(24, 32, dtype=dtype), quant_type)
    like = quantize_nf4(torch.empty(24, 32, device="meta"), quant_type)
    joined = join_parts(parts_of(weight), like)
    assert (type(joined), joined.dtype, joined.shape) == (type(weight), dtype, weight.shape)
    assert joined.device == weight.device
    assert torch.equal(dequantize_nf4(joined), dequantize_nf4(weight))  # type: ignore[arg-type]
    for name, part in parts_of(joined).items():
        assert part.data_ptr() == getattr(weight, name).data_ptr(), f"{name} was copied"


def test_plain_tensor_has_no_parts() -> None:
    assert parts_of(torch.zeros(2)) == {}
