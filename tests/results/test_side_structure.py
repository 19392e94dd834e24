"""Side networks that compute otherwise from the same tensors are told apart, others are not."""

import json
from pathlib import Path

import pytest
import torch

from qst_tune.errors import UserError
from qst_tune.models import qst_decoder
from qst_tune.results.side_structure import check_structure, side_structure
from tests.support.numbers import TINY_REDUCTION, random_tokens, randomize_, tiny_backbone


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
    "activation": ({"activation": "silu"}, {"activation": "gelu"}, "activation"),
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
    description = {"structure": side_structure(first.side)}
    check_structure(Path("here"), description, first.side)
    with pytest.raises(UserError, match=f"another model: {key} "):
        check_structure(Path("here"), description, second.side)


def test_the_layers_beside_the_blocks_are_told() -> None:
    assert side_structure(model_with(num_side_blocks=2).side)["layers"] == [0, 2]


@pytest.mark.parametrize(
    "settings",
    [{"dropout": 0.5}, {"initial_gamma": 0.5}, {"quantize_base": True}, {"hidden_bits": 8}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_not_of_the_side_networks_function_is_not_told(settings) -> None:
    description = {"structure": side_structure(model_with(**settings).side)}
    check_structure(Path("here"), description, model_with().side)


def test_json_keeps_it() -> None:
    structure = side_structure(model_with().side)
    assert json.loads(json.dumps(structure)) == structure


OLDER = {
    "reads": "output",
    "layers": [0, 1, 2],
    "normalize_hidden": True,
    "num_heads": 1,
    "num_kv_heads": 1,
    "downsample": "LowRankDownsample, SiLU",
    "output_mix": "ResidualMix",
}


def older(block: dict[str, object], **changes: object) -> dict[str, object]:
    return {"model": block, "structure": {**OLDER, **changes}}


def test_directories_of_before_the_configuration_was_written_are_read() -> None:
    check_structure(Path("here"), older({"rank": 4}), model_with().side)
    swapped = model_with(output_mix="swapped_sigmoid").side
    mix = "SigmoidMix, swapped"
    check_structure(Path("here"), older({"variant": "default"}, output_mix=mix), swapped)
    for block, changes, key in [
        ({}, {"normalize_hidden": False}, "normalize_hidden"),
        ({"activation": "gelu"}, {}, "activation"),
        ({"downsample": "lora"}, {}, "downsample"),
        ({"output_mix": "alpha"}, {}, "output_mix"),
        ({}, {"reads": "input"}, "it reads the input of layers"),
    ]:
        with pytest.raises(UserError, match=key):
            check_structure(Path("here"), older(block, **changes), model_with().side)
