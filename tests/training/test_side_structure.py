"""Side networks that compute otherwise from the same tensors are told apart, others are not."""

import json

import pytest
import torch

from qst_tune.models import qst_decoder
from qst_tune.training.side_structure import side_structure
from tests.helpers import TINY_REDUCTION, random_tokens, randomize_, tiny_backbone


def model_with(**settings):
    torch.manual_seed(0)
    # As many as query heads: any number of side heads has the same tensors.
    backbone = tiny_backbone(num_kv_heads=6)
    settings = {"reduction_factor": TINY_REDUCTION, "rank": 4, "quantize_base": False, **settings}
    return qst_decoder(backbone, **settings).eval()


# What changes, from what, and the key that tells.
CHANGES = {
    "heads": ({"min_head_dim": 4}, {"min_head_dim": 12}, "num_heads"),
    "pooling": ({"downsample": "maxpool"}, {"downsample": "avgpool"}, "downsample"),
    "activation": ({"activation": "silu"}, {"activation": "gelu"}, "downsample"),
    "normalised": ({}, {"normalize_hidden": False}, "normalize_hidden"),
    "mix": (
        {"output_mix": "sigmoid"},
        {"output_mix": "swapped_sigmoid"},
        "output_mix",
    ),
}


@pytest.mark.parametrize(("one", "other", "key"), CHANGES.values(), ids=CHANGES)
def test_same_tensors_another_function_another_structure(one, other, key: str) -> None:
    first, second = model_with(**one), model_with(**other)
    randomize_(first.side)
    second.side.load_state_dict(first.side.state_dict())
    tokens = random_tokens()
    with torch.no_grad():
        assert (first(tokens) - second(tokens)).abs().max() > 1e-3
    here, there = side_structure(first.side), side_structure(second.side)
    assert {name for name in here if here[name] != there[name]} - {"num_kv_heads"} == {key}


def test_the_layers_beside_the_blocks_are_told() -> None:
    assert side_structure(model_with(num_side_blocks=2).side)["layers"] == [0, 2]


@pytest.mark.parametrize(
    "settings",
    [{"dropout": 0.5}, {"initial_gamma": 0.5}, {"quantize_base": True}, {"hidden_bits": 8}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_not_of_the_side_networks_function_is_not_told(settings) -> None:
    assert side_structure(model_with(**settings).side) == side_structure(model_with().side)


def test_json_keeps_it() -> None:
    structure = side_structure(model_with().side)
    assert json.loads(json.dumps(structure)) == structure
