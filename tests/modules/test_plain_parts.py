"""A backbone of plain parts computes what it did, and its parts hold all there is of it."""

import pytest
import torch
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.modules.backbone_formats import BaseQuantization, quantization_of, quantize_linears
from qst_tune.modules.plain_parts import Place, expose_parts, join_parts, parts_of, plain_parts
from qst_tune.quantization.nf4 import QuantType, dequantize_nf4, quantize_nf4

FORMATS: list[BaseQuantization] = ["nf4", "fp4", "int4", "int8", "none"]


def linear(quantization: BaseQuantization, dtype: torch.dtype) -> nn.Module:
    # 9 x 36 values make 81 blocks of 4: nothing of it can be halved.
    model = nn.Sequential(nn.Linear(36, 9, dtype=dtype))
    quantize_linears(model, quantization)
    return model[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", FORMATS)
def test_exposed_linear_computes_the_same_to_the_last_bit(
    quantization: BaseQuantization, dtype: torch.dtype
) -> None:
    module, x = linear(quantization, dtype), torch.randn(3, 36, dtype=dtype)
    expected, format_before = module(x), quantization_of(module)
    expose_parts(module)
    assert torch.equal(module(x), expected)
    assert quantization_of(module) == format_before


@pytest.mark.parametrize("quantization", FORMATS)
def test_exposed_parts_are_the_plain_parts_and_none_of_them_is_a_subclass(
    quantization: BaseQuantization,
) -> None:
    module = linear(quantization, torch.float32)
    before = {name: part.detach().clone() for name, part in plain_parts(module).items()}
    places = expose_parts(module)
    assert places.keys() == before.keys()
    for name, place in places.items():
        assert torch.equal(place.tensor, before[name])
        assert type(place.tensor) in (nn.Parameter, torch.Tensor)
    # What FSDP shards are parameters; of an NF4 weight 17 numbers are left out.
    parameters = sum(p.nbytes for p in module.parameters())
    assert sum(part.nbytes for part in before.values()) - parameters in (0, 17 * 4)
    assert not any(isinstance(p, NF4Tensor) for p in module.parameters())


def test_what_trained_trains_still_and_nothing_else_begins_to() -> None:
    module = linear("int8", torch.float32)
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    expose_parts(module)
    after = {name: p.requires_grad for name, p in module.named_parameters()}
    assert before == {"weight_scale": True, "bias": False}
    assert after == {**before, "codes": False, "zero_point": False}


def test_values_put_into_the_places_are_the_weight() -> None:
    source, target = linear("nf4", torch.float32), linear("nf4", torch.float32)
    places, x = expose_parts(target), torch.randn(3, 36)
    for name, part in plain_parts(source).items():
        places[name].put(part.detach().clone())
    assert torch.equal(target(x), source(x))


def test_place_keeps_a_parameter_a_parameter_and_a_buffer_a_buffer() -> None:
    norm = nn.BatchNorm1d(3)
    for name in ("weight", "running_mean"):
        Place(norm, name).put(torch.full((3,), 2.0))
    parameters, buffers = dict(norm.named_parameters()), dict(norm.named_buffers())
    assert parameters["weight"].tolist() == buffers["running_mean"].tolist() == [2, 2, 2]
    assert parameters["weight"].requires_grad


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
