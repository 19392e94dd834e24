"""A linear layer that computes with the decoded weight and keeps only the coded one."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from qst_tune.modules.nf4_linear import NF4Linear, quantize_linears
from qst_tune.quantization.nf4 import nf4_block_sizes
from tests.helpers import tiny_backbone

SHAPES = [(192, 576), (36, 50), (64, 64)]


def decoded_by_torchao(weight):
    return to_nf4(weight, *nf4_block_sizes(weight.numel())).get_original_weight()


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
    with pytest.raises(ValueError, match="15 elements cannot be stored as NF4"):
        NF4Linear(torch.randn(3, 5))


def test_quantize_linears_replaces_every_linear_and_nothing_else():
    class Special(nn.Linear):
        """A subclass has behaviour of its own that NF4Linear would drop."""

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 6),
            "nested": nn.Sequential(nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 4, bias=False))),
            "special": Special(4, 4),
            "embedding": nn.Embedding(6, 4),
            "conv": nn.Conv1d(2, 2, 1),
        }
    )
    others = {
        name: module
        for name, module in model.named_modules()
        if type(module) is not nn.Linear and not list(module.children())
    }
    dense = {"plain": model["plain"].weight, "nested.1.0": model["nested"][1][0].weight}
    bias = model["plain"].bias.detach().clone()
    quantize_linears(model)
    after = dict(model.named_modules())
    assert {name for name, module in after.items() if type(module) is NF4Linear} == set(dense)
    for name, weight in dense.items():
        expected = decoded_by_torchao(weight.detach())
        assert torch.equal(after[name].weight.get_original_weight(), expected)
    assert torch.equal(model["plain"].bias, bias)
    assert model["nested"][1][0].bias is None
    assert all(after[name] is module for name, module in others.items())


def test_quantize_linears_on_meta_keeps_names_and_shapes():
    with torch.device("meta"):
        backbone = tiny_backbone()
    shapes = {name: p.shape for name, p in backbone.named_parameters()}
    quantize_linears(backbone.layers)
    assert {name: p.shape for name, p in backbone.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in backbone.parameters())
    assert isinstance(backbone.layers[0].attn.q_proj.weight, NF4Tensor)
    assert type(backbone.output) is nn.Linear
