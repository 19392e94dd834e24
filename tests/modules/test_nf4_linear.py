"""A linear layer that computes with the decoded weight and keeps only the coded one."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.quantization.nf4 import quantize_nf4
from tests.support.numbers import decoded_by_torchao

SHAPES = [(192, 576), (36, 50), (64, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_output_and_input_gradient_equal_the_dense_layer_of_the_decoded_weight(
    shape, dtype, has_bias
):
    weight = torch.randn(shape).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if has_bias else None
    layer = NF4Linear(weight, bias)
    x = torch.randn(2, 5, shape[1]).to(dtype).requires_grad_()
    dense = decoded_by_torchao(weight)
    y = layer(x)
    expected = F.linear(x, dense)
    expected = expected if bias is None else expected + bias
    assert y.dtype == dtype
    assert torch.equal(y, expected)

    grad = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, grad)
    # As autograd computes it. F.linear's own may fold the batch first: the same sums.
    (theirs,) = torch.autograd.grad(expected, x, grad)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_tokens", [1, 64, 65])
@pytest.mark.parametrize("has_bias", [True, False])
@torch.no_grad()
def test_few_tokens_through_a_weight_in_parts_give_the_same(num_tokens, has_bias, monkeypatch):
    monkeypatch.setattr("qst_tune.quantization.nf4._AT_ONCE", 1000)
    layer = NF4Linear(torch.randn(192, 576), torch.randn(192) if has_bias else None)
    x, shapes = torch.randn(1, num_tokens, 576), []
    expected = F.linear(x, layer.weight.get_original_weight(), layer.bias)
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, *b: shapes.append(len(w)) or linear(x, w, *b))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)  # sums of 576
    assert shapes == ([1] * 192 if num_tokens <= 64 else [192])


def test_another_dtype_of_the_input_decides_the_output():
    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    x = torch.randn(3, 64, requires_grad=True)
    y = NF4Linear(weight)(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.float32, torch.float32)
    assert torch.equal(y, F.linear(x, decoded_by_torchao(weight).float()))


def test_weight_and_bias_are_frozen():
    layer = NF4Linear(torch.randn(64, 64), torch.randn(64))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    layer(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_nothing_dense_is_kept_for_backward():
    saved = []
    layer = NF4Linear(torch.randn(46, 62))
    x = torch.randn(2, 62, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        y = layer(x * 1.0)
    assert not any(tensor.shape in ((46, 62), (62, 46)) for tensor in saved)
    gc.collect()
    alive = [
        thing
        for thing in gc.get_objects()
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.numel() == 46 * 62
    ]
    assert not alive
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_loading_a_dense_weight_quantises_it(shape, dtype):
    layer = NF4Linear(torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype))
    state = {"weight": torch.randn(shape).to(dtype), "bias": torch.randn(shape[0]).to(dtype)}
    layer.load_state_dict(state)
    assert isinstance(layer.weight, NF4Tensor)
    fresh = NF4Linear(state["weight"], state["bias"])
    x = torch.randn(3, shape[1]).to(dtype)
    assert torch.equal(layer(x), fresh(x))
    assert torch.equal(layer.weight.quantized_data, fresh.weight.quantized_data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_fp4_layer_stays_fp4_when_a_dense_weight_is_loaded(dtype):
    """torchao's own copy would silently make it NF4."""
    first, second = torch.randn(2, 64, 50).to(dtype)
    layer = NF4Linear(first, quant_type="fp4")
    layer.load_state_dict({"weight": second})
    expected = quantize_nf4(second, "fp4").get_original_weight()
    assert torch.equal(layer.dense_weight(dtype), expected)
    x = torch.randn(3, 50).to(dtype)
    assert torch.equal(layer(x), F.linear(x, expected))
    assert not torch.equal(expected, quantize_nf4(second).get_original_weight())
    layer.quantize_(first)
    assert torch.equal(layer.dense_weight(dtype), quantize_nf4(first, "fp4").get_original_weight())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_layer_on_meta_takes_a_dense_weight_by_assignment(quant_type):
    layer = NF4Linear(torch.empty(64, 50, device="meta"), quant_type=quant_type)
    dense = torch.randn(64, 50)
    layer.load_state_dict({"weight": dense}, assign=True)
    expected = quantize_nf4(dense, quant_type).get_original_weight()
    assert torch.equal(layer.dense_weight(torch.float32), expected)


def test_a_weight_that_is_nf4_already_is_taken_as_it_is():
    quantized = to_nf4(torch.randn(64, 256))
    assert NF4Linear(quantized).weight.quantized_data is not None
    assert torch.equal(NF4Linear(quantized).weight.quantized_data, quantized.quantized_data)


def test_it_is_a_linear_layer_to_everyone_else():
    layer = NF4Linear(torch.randn(36, 50))
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.bias) == (50, 36, None)
    assert list(layer.state_dict()) == ["weight"]


def test_an_odd_weight_is_refused():
    with pytest.raises(ValueError, match="15 elements cannot be stored in 4 bits"):
        NF4Linear(torch.randn(3, 5))
