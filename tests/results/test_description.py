"""Side networks that compute otherwise from the same tensors are told apart, others are not."""

import json
from pathlib import Path

import pytest
import torch

from qst_tune.backbone.identity import BackboneId
from qst_tune.errors import UserError
from qst_tune.models import qst_decoder
from qst_tune.results.description import (
    SCALES,
    SIDE_NETWORK,
    Ancestor,
    Description,
    SideStructure,
    read_description,
)
from tests.support.numbers import TINY_REDUCTION, random_tokens, randomize_, tiny_backbone

BACKBONE = BackboneId("tiny", "0123456789abcdef" * 4, "nf4", "", "torchtune")


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
    there = SideStructure.of(first.side)
    assert there.differences(SideStructure.of(first.side)) == []
    assert there.differences(SideStructure.of(second.side))[0].startswith(f"{key} ")


def test_the_layers_beside_the_blocks_are_reported() -> None:
    assert SideStructure.of(model_with(num_side_blocks=2).side).layers == (0, 2)


@pytest.mark.parametrize(
    "settings",
    [{"dropout": 0.5}, {"initial_gamma": 0.5}, {"quantize_base": True}, {"hidden_bits": 8}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_not_of_the_side_networks_function_is_not_reported(settings) -> None:
    there = SideStructure.of(model_with(**settings).side)
    assert there.differences(SideStructure.of(model_with().side)) == []


def written(directory: Path, **changes: object) -> Path:
    """Write a description with some values replaced."""
    side = model_with().side
    block = {"_component_": "tests.tiny", "rank": 4}
    found = Description(SIDE_NETWORK, BACKBONE, block, SideStructure.of(side), {"loss": 1.5})
    path = directory / "qst_config.json"
    path.write_text(json.dumps({**json.loads(found.to_json()), **changes}))
    return directory


def test_what_is_written_is_read(tmp_path: Path) -> None:
    lineage = (Ancestor("a/side_network", "f" * 64, 3, ("rows.jsonl",)), Ancestor("b", "0" * 64))
    structure = SideStructure.of(model_with().side)
    for found in (
        Description(SIDE_NETWORK, BACKBONE, {"rank": 4}, structure, {"loss": 1.5}, lineage, "no"),
        Description(SCALES, BACKBONE, {"bits": 4}),
    ):
        (tmp_path / found.form.config_file).write_bytes(found.to_json())
        assert read_description(tmp_path, found.form) == found


OLDER = {
    "reads": "output",
    "layers": [0, 1, 2],
    "normalize_hidden": True,
    "num_heads": 1,
    "num_kv_heads": 1,
    "downsample": "LowRankDownsample, SiLU",
    "output_mix": "ResidualMix",
}


def test_directories_of_before_the_configuration_was_written_are_read(tmp_path: Path) -> None:
    def differences(block: dict[str, object], **changes: object) -> list[str]:
        written(tmp_path, model=block, structure={**OLDER, **changes})
        structure = read_description(tmp_path).structure
        assert structure is not None
        return structure.differences(SideStructure.of(model_with(**here).side))

    here: dict[str, object] = {}
    assert differences({"rank": 4}) == []
    for block, changes, key in [
        ({}, {"normalize_hidden": False}, "normalize_hidden"),
        ({"activation": "gelu"}, {}, "activation"),
        ({"downsample": "lora"}, {}, "downsample"),
        ({"output_mix": "alpha"}, {}, "output_mix"),
    ]:
        assert differences(block, **changes)[0].startswith(key)
    here = {"output_mix": "swapped_sigmoid"}
    assert differences({"variant": "default"}, output_mix="SigmoidMix, swapped") == []
    with pytest.raises(UserError, match="it reads the input of layers"):
        differences({}, reads="input")
