"""The formats of a frozen backbone, and where they are put."""

import pytest
import torch
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.models.gemma import gemma
from torchtune.modules import TiedLinear

from qst_tune.models import peqa_decoder, qst_decoder
from qst_tune.modules import LinearCrossEntropyLoss
from qst_tune.modules.backbone_formats import (
    quantization_of,
    quantization_of_backbone,
    quantize_embedding,
    quantize_linears,
)
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.quantization.nf4 import quantize_nf4
from qst_tune.quantization.table import QuantizedTable
from tests.support.numbers import TINY, decoded_by_torchao, random_tokens, randomize_, tiny_backbone


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


CASES = {
    "untied": lambda: tiny_backbone(tied=False),
    "tied": lambda: tiny_backbone(tied=True),
    "scaled embedding": lambda: gemma(**TINY, head_dim=16),
}


def tables(decoder) -> dict[str, QuantizedTable]:
    named = decoder.named_parameters()
    return {name: p for name, p in named if isinstance(p, QuantizedTable)}


def dense_twin(decoder, build):
    """The same decoder with the values that the codes stand for, as plain weights."""
    twin = build()
    state = {
        name: value.dense() if isinstance(value, QuantizedTable) else value
        for name, value in decoder.state_dict().items()
    }
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_head_computes_with_the_decoded_table(case):
    def build():
        return CASES[case]().requires_grad_(False).eval()

    decoder = build()
    randomize_(decoder)
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    quantize_embedding(decoder, "int8")
    tied = {"tok_embeddings.weight"}
    assert tables(decoder).keys() == (tied if case != "untied" else {*tied, "output.weight"})
    assert {n: p.shape for n, p in decoder.named_parameters()} == {
        n: p.shape for n, p in before.items()
    }
    twin = dense_twin(decoder, build)
    tokens = random_tokens()
    logits, expected = decoder(tokens), twin(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_a_tied_head_reads_the_same_table():
    decoder = tiny_backbone(tied=True)
    quantize_embedding(decoder, "int8")
    assert isinstance(decoder.output, TiedLinear)
    assert decoder.output.tied_module.weight is decoder.tok_embeddings.weight


@pytest.mark.parametrize("tied", [False, True])
def test_the_side_network_gets_the_gradient_of_the_dense_model(tied):
    """Through the chunked loss, to every parameter that trains."""

    def build(**settings):
        torch.manual_seed(0)
        backbone = tiny_backbone(tied=tied)
        return qst_decoder(backbone, reduction_factor=4, base_quantization="none", **settings)

    model = build(embedding_quantization="int8")
    twin = dense_twin(model, build)
    tokens = random_tokens()
    gradients = []
    for each in (model, twin):
        nn.init.constant_(each.side.upsample.weight, 0.01)  # zero at first, which hides the rest
        loss = LinearCrossEntropyLoss(chunk_tokens=4)
        loss.set_model_output(each)
        loss(each(tokens[:, :-1]), tokens[:, 1:]).backward()
        gradients.append([p.grad for p in each.side.parameters()])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in tables(model).values())


def test_the_name_of_a_backbone_tells_how_all_of_it_is_stored():
    def name(**settings):
        return quantization_of_backbone(
            qst_decoder(tiny_backbone(), reduction_factor=4, **settings)
        )

    assert name() == "nf4"
    assert name(embedding_quantization="int8") == "nf4; embedding int8"
    assert name(base_quantization="none", embedding_quantization="int8") == "none; embedding int8"
    peqa = peqa_decoder(tiny_backbone(), bits=3, embedding_quantization="int8")
    assert quantization_of_backbone(peqa) == "int3, per channel, rtn; embedding int8"


def test_peqa_trains_the_scales_and_not_those_of_the_table():
    model = peqa_decoder(tiny_backbone(), embedding_quantization="int8")
    plain = peqa_decoder(tiny_backbone())
    assert model.task().keys() == plain.task().keys()
    model(random_tokens()).logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.task().values())


def test_an_unknown_format_or_embedding_is_refused():
    with pytest.raises(ValueError, match="='int4' is unknown; choose one of none, int8"):
        quantize_embedding(tiny_backbone(), "int4")
    backbone = tiny_backbone()
    backbone.tok_embeddings = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"takes an nn\.Embedding, not Linear"):
        quantize_embedding(backbone, "int8")
