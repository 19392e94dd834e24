"""The formats of a frozen backbone, and where they are put."""

import pytest
import torch
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.modules.base_quantization import quantization_of, quantize_linears
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.quantization.nf4 import quantize_nf4
from tests.support.numbers import decoded_by_torchao, tiny_backbone


@pytest.mark.parametrize("name", ["nf4", "fp4", "none"])
def test_every_format_is_what_its_name_says(name):
    backbone = tiny_backbone()
    dense = backbone.layers[1].mlp.w2.weight.detach().clone()
    quantize_linears(backbone.layers, name)
    linear = backbone.layers[1].mlp.w2
    assert type(linear) is (nn.Linear if name == "none" else NF4Linear)
    expected = dense if name == "none" else quantize_nf4(dense, name).get_original_weight()
    weight = linear.weight if name == "none" else linear.dense_weight(torch.float32)
    assert torch.equal(weight, expected)
    assert quantization_of(backbone.layers) == name


@pytest.mark.parametrize(
    ("name", "bits", "group_size", "title"),
    [("int4", 4, 64, "int4, groups of 64, rtn"), ("int8", 8, None, "int8, per channel, rtn")],
)
def test_integer_formats_are_rounding_to_nearest(name, bits, group_size, title):
    backbone = tiny_backbone()
    dense = backbone.layers[1].mlp.w2.weight.detach().clone()
    quantize_linears(backbone.layers, name)
    linear = backbone.layers[1].mlp.w2
    expected = PEQALinear(dense, bits=bits, group_size=group_size).dense_weight(torch.float32)
    assert torch.equal(linear.dense_weight(torch.float32), expected)
    assert (expected - dense).abs().max() < 1.001 * dense.abs().max() / (2**bits - 1)
    assert quantization_of(backbone.layers) == title


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'int3' is unknown; choose one of auto, nf4, fp4"):
        quantize_linears(tiny_backbone().layers, "int3")


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


def test_auto_is_nf4_of_a_decoder_that_is_not_quantised_yet():
    backbone = tiny_backbone()
    quantize_linears(backbone.layers, "auto")
    assert quantization_of(backbone.layers) == "nf4"
