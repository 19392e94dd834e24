"""What was built on meta gets its first values."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtune.models.gemma import gemma
from torchtune.models.llama3_1 import llama3_1

from qst_tune.models import qst_decoder
from qst_tune.modules.meta_device import build_rotary_caches, materialize
from qst_tune.modules.qst_decoder import QSTDecoder
from tests.support.numbers import TINY, random_tokens, tiny_backbone
from tests.support.side_networks import assert_documented_initial_values, side_of, toy_side


@pytest.mark.parametrize("variant", ["default", "paper", "authors"])
def test_materialising_from_meta_gives_the_same_initial_values(variant):
    with torch.device("meta"):
        side = side_of(variant)
    assert all(parameter.is_meta for parameter in side.parameters())
    materialize(side, torch.device("cpu"))
    assert {parameter.dtype for parameter in side.parameters()} == {torch.float32}
    assert_documented_initial_values(side, variant)
    rope = side.blocks[0].attn.pos_embeddings
    assert torch.equal(rope.cache, side_of(variant).blocks[0].attn.pos_embeddings.cache)
    assert not any(buffer.is_meta for buffer in side.buffers())


@pytest.mark.parametrize("variant", ["default", "paper", "authors"])
def test_gates_and_mixes_train_after_every_way_to_a_device(variant):
    """The authors' code wraps its output gate in .to(device): on a GPU it is no parameter."""
    with torch.device("meta"):
        side = side_of(variant)
    names = set(side.adapter_params())
    materialize(side, torch.device("cpu"))
    side.to(torch.device("cpu"), torch.float64).to(torch.float32)
    model = QSTDecoder(tiny_backbone(), side)
    parameters = dict(model.side.named_parameters())
    assert set(parameters) == names
    for name, parameter in parameters.items():
        assert isinstance(parameter, nn.Parameter), name
        assert parameter.requires_grad, name
        assert parameter.is_leaf, name
    if variant != "authors":  # at the start only the last layer has a gradient
        for parameter in (model.side.upsample.weight, *model.side.output_mix.parameters()):
            nn.init.constant_(parameter, 0.3)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    tokens = random_tokens()
    optimizer = torch.optim.SGD(model.side.parameters(), lr=1.0)
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    assert [name for name in names if torch.equal(parameters[name], before[name])] == []


def test_materialising_knows_gemmas_norm():
    with torch.device("meta"):
        model = qst_decoder(gemma(**TINY, head_dim=16), reduction_factor=4)
    materialize(model.side, torch.device("cpu"))
    assert not model.side.norm.scale.any()
    assert not model.side.blocks[0].sa_norm.scale.any()


def test_materialising_refuses_to_leave_memory_uninitialised():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    side = toy_side()
    side.norm = Unknown()
    with pytest.raises(ValueError, match="Unknown cannot be initialised in place"):
        materialize(side, torch.device("cpu"))


def test_caches_of_a_model_on_meta_become_those_of_one_that_was_built_with_memory():
    for builder in (tiny_backbone, lambda: llama3_1(**TINY)):
        with torch.device("meta"):
            model = builder()
        build_rotary_caches(model.layers, torch.device("cpu"))
        expected = dict(builder().named_buffers())
        assert expected.keys() == dict(model.named_buffers()).keys()
        assert all(torch.equal(b, expected[name]) for name, b in model.named_buffers())
        assert all(parameter.is_meta for parameter in model.parameters())
