"""A task of PEQA on disk: its scales and nothing else, tied to the codes they belong to."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qst_tune.atomic_files import write_directory
from qst_tune.backbone.identity import BackboneId
from qst_tune.errors import UserError
from qst_tune.models import peqa_decoder, qst_decoder
from qst_tune.results.scales import SCALES, load_scales, scales_files
from qst_tune.results.side_network import load_side_network
from qst_tune.results.tuned_directory import Provenance, read_description
from tests.support.numbers import TINY_REDUCTION, random_tokens, tiny_backbone

BACKBONE = BackboneId("tiny", "0123456789abcdef" * 4, "int4, per channel, rtn")
MODEL_BLOCK = {"_component_": "tests.tiny", "bits": 4}


def model_of(**settings):
    torch.manual_seed(0)
    return peqa_decoder(tiny_backbone(), **settings)


def tuned(factor: float, **settings):
    model = model_of(**settings)
    model.load_task({name: value * factor for name, value in model.task().items()})
    return model


def save(directory: Path, model) -> Path:
    provenance = Provenance(BACKBONE, MODEL_BLOCK, "epochs: 1\n", {"val_loss": 1.25})
    write_directory(directory, scales_files(model, provenance))
    return directory


@pytest.mark.parametrize("settings", [{}, {"group_size": 32}, {"train_zero_points": True}])
def test_tasks_are_exchanged_on_a_loaded_model_bit_for_bit(settings, tmp_path: Path) -> None:
    tokens = random_tokens()
    a, b = tuned(1.1, **settings), tuned(0.9, **settings)
    save(tmp_path / "a", a)
    save(tmp_path / "b", b)
    model = model_of(**settings)
    for name, expected in (("a", a), ("b", b), ("a", a)):
        load_scales(tmp_path / name, model, backbone=BACKBONE)
        assert torch.equal(model(tokens), expected(tokens))


def test_the_file_holds_the_scales_and_nothing_else(tmp_path: Path) -> None:
    model = tuned(1.1)
    directory = save(tmp_path / "scales", model)
    names = {"scales.safetensors", "peqa_config.json", "recipe_config.yaml", "README.md"}
    assert {path.name for path in directory.iterdir()} == names
    tensors = load_file(directory / "scales.safetensors")
    assert tensors.keys() == model.task().keys()
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    num_bytes = 4 * sum(tensor.numel() for tensor in tensors.values())
    assert 0 < (directory / "scales.safetensors").stat().st_size - num_bytes < 10_000


def test_description_and_card_say_what_it_belongs_to(tmp_path: Path) -> None:
    directory = save(tmp_path / "scales", tuned(1.1))
    description = read_description(directory, SCALES)
    assert description["method"] == "peqa"
    assert description["backbone"]["quantization"] == "int4, per channel, rtn"
    assert description["model"] == MODEL_BLOCK
    card = (directory / "README.md").read_text()
    assert "# A set of PEQA scales for tiny" in card
    assert "| val_loss | 1.25 |" in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "f" * 64}, "was trained on another backbone .*: fingerprint '0123"),
        ({"quantization": "int3, per channel, rtn"}, "quantization 'int4, per channel, rtn' there"),
        ({"quantization": "int4, groups of 64, rtn"}, "quantization 'int4, per channel"),
    ],
)
def test_scales_of_other_codes_are_refused(changes, message: str, tmp_path: Path) -> None:
    directory, model = save(tmp_path / "scales", tuned(1.1)), model_of()
    before = {name: value.detach().clone() for name, value in model.task().items()}
    with pytest.raises(UserError, match=message):
        load_scales(directory, model, backbone=replace(BACKBONE, **changes))
    assert all(torch.equal(value, before[name]) for name, value in model.task().items())


def test_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    directory = save(tmp_path / "scales", tuned(1.1))
    with pytest.raises(UserError, match=r"21 tensors differ, for example layers\.0\.attn\.k_proj"):
        load_scales(directory, model_of(group_size=32), backbone=BACKBONE)


def test_the_directory_of_another_method_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path / "scales", tuned(1.1))
    side = qst_decoder(tiny_backbone(), reduction_factor=TINY_REDUCTION).side
    with pytest.raises(UserError, match=r"it has no qst_config\.json"):
        load_side_network(directory, side, backbone=BACKBONE)
    content = json.loads((directory / "peqa_config.json").read_text())
    (directory / "peqa_config.json").write_text(json.dumps({**content, "method": "qst"}))
    with pytest.raises(UserError, match="does not describe a set of PEQA scales"):
        load_scales(directory, model_of(), backbone=BACKBONE)
