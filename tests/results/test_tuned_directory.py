"""A side network or scales on disk: what goes in comes out, and nothing else comes in."""

import errno
import itertools
import json
import os
import shutil
from collections.abc import Collection
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qst_tune import __version__
from qst_tune.backbone.identity import BackboneId
from qst_tune.errors import UserError
from qst_tune.models import peqa_decoder, qst_decoder
from qst_tune.results.description import SCALES, read_description
from qst_tune.results.tuned_directory import Provenance, load_tuned, save_tuned
from tests.support.numbers import TINY_REDUCTION, random_tokens, randomize_, tiny_backbone

BACKBONE = BackboneId(name="tiny", fingerprint="0123456789abcdef" * 4, quantization="nf4")
MODEL_BLOCK = {"_component_": "tests.tiny", "reduction_factor": TINY_REDUCTION, "rank": 4}
FILES = {
    "side_network.safetensors",
    "qst_config.json",
    "config.json",
    "recipe_config.yaml",
    "README.md",
}
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def side_network(sizes=None, **settings):
    settings = {"reduction_factor": TINY_REDUCTION, "rank": 4, **settings}
    side = qst_decoder(tiny_backbone(**(sizes or {})), **settings).side
    randomize_(side)
    return side


def save(directory: Path, side, **changes) -> None:
    arguments = {
        "backbone": BACKBONE,
        "model_block": MODEL_BLOCK,
        "recipe_config": "epochs: 1\n",
        "results": {"validation loss": 1.25},
        **changes,
    }
    save_tuned(directory, side, Provenance(**arguments))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "side_network", side_network())
    return tmp_path / "side_network"


# Writing.


def test_transformers_finds_the_backbone_and_the_classes(tmp_path: Path) -> None:
    save(tmp_path / "text", side_network(), backbone_path="/models/tiny")
    config = json.loads((tmp_path / "text/config.json").read_text())
    assert config["model_type"] == "qst"
    assert config["backbone"] == "/models/tiny"
    save(tmp_path / "classes", side_network(), model_block={**MODEL_BLOCK, "num_labels": 2})
    config = json.loads((tmp_path / "classes/config.json").read_text())
    assert config["architectures"] == ["QSTForSequenceClassification"]
    assert len(config["id2label"]) == 2


@pytest.mark.parametrize("variant", ["default", "paper", "authors"])
def test_round_trip_is_exact(variant: str, tmp_path: Path) -> None:
    side, other = side_network(variant=variant), side_network(variant=variant)
    save(tmp_path / "side", side)
    load_tuned(tmp_path / "side", other, backbone=BACKBONE)
    for name, value in side.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_directory_holds_the_documented_files(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == FILES
    assert [path.name for path in saved.parent.iterdir()] == ["side_network"]
    assert (saved / "recipe_config.yaml").read_text() == "epochs: 1\n"
    (saved.parent / "plain").mkdir()  # a temporary directory would be the owner's alone
    assert saved.stat().st_mode == (saved.parent / "plain").stat().st_mode


def test_description_says_what_it_was_trained_on(saved: Path) -> None:
    side = side_network()
    assert json.loads((saved / "qst_config.json").read_text()) == {
        "method": "qst",
        "format_version": 2,
        "qst_tune_version": __version__,
        "backbone": {
            "name": "tiny",
            "fingerprint": BACKBONE.fingerprint,
            "quantization": "nf4",
            "revision": "",
            "library": "torchtune",
        },
        "model": MODEL_BLOCK,
        "structure": {
            **asdict(side.config),
            "lora_attn_modules": list(side.config.lora_attn_modules),
            "layers": [0, 1, 2],
            "num_heads": 1,
            "num_kv_heads": 1,
            "num_layers": 3,
        },
        "weights_sha256": sha256((saved / "side_network.safetensors").read_bytes()).hexdigest(),
        "results": {"validation loss": 1.25},
    }


def test_model_card_names_the_backbone_and_the_results(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    assert "# A QST side network for tiny" in card
    assert "| validation loss | 1.25 |" in card
    assert BACKBONE.fingerprint[:16] in card


def test_file_holds_the_parameters_by_name_and_nothing_else(tmp_path: Path) -> None:
    side = side_network()
    save(tmp_path / "side", side)
    tensors = load_file(tmp_path / "side" / "side_network.safetensors")
    assert tensors.keys() == dict(side.named_parameters()).keys()
    num_bytes = 4 * sum(tensor.numel() for tensor in tensors.values())
    file_bytes = (tmp_path / "side" / "side_network.safetensors").stat().st_size
    assert num_bytes < file_bytes < num_bytes + 200 * len(tensors)


def test_saving_again_replaces_the_directory(saved: Path) -> None:
    (saved / "stale.txt").write_text("from an older version")
    side = side_network()
    save(saved, side)
    assert {path.name for path in saved.iterdir()} == FILES
    assert [path.name for path in saved.parent.iterdir()] == ["side_network"]
    other = side_network()
    load_tuned(saved, other, backbone=BACKBONE)
    assert torch.equal(other.upsample.weight, side.upsample.weight)


# 4 files are flushed one by one; then the old directory is moved away and the new one put in place.
INTERRUPTIONS = [("fsync", index) for index in range(4)] + [("rename", index) for index in range(2)]


def fail_at(
    patch: pytest.MonkeyPatch, call: str, indices: Collection[int], error: BaseException
) -> None:
    """Let some of the calls of ``os.fsync``, or of a method of ``Path``, raise an error."""
    owner = os if call == "fsync" else Path
    original = getattr(owner, call)
    count = itertools.count()

    def fail(*args):
        if next(count) in indices:
            raise error
        return original(*args)

    patch.setattr(owner, call, fail)


@pytest.mark.parametrize(("call", "index"), INTERRUPTIONS)
@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt()], ids=["full disk", "ctrl-c"])
def test_interrupted_write_leaves_the_old_directory(
    error: BaseException, call: str, index: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with monkeypatch.context() as patch:
        fail_at(patch, call, [index], error)
        with pytest.raises(UserError if error is NO_SPACE else KeyboardInterrupt) as info:
            save(saved, side_network())
    if error is NO_SPACE:
        assert str(info.value) == f"cannot write {saved}: No space left on device"
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["side_network"]


def test_old_directory_survives_even_where_it_cannot_be_put_back(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    fail_at(monkeypatch, "rename", range(1, 100), NO_SPACE)
    with pytest.raises(UserError, match="No space left"):
        save(saved, side_network())
    (left,) = saved.parent.glob(".side_network.*/old")
    assert {path.name: path.read_bytes() for path in left.iterdir()} == before


@pytest.mark.parametrize(("call", "index"), [("fsync", 0), ("fsync", 3), ("rename", 0)])
def test_interrupted_first_write_leaves_nothing(
    call: str, index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, call, [index], NO_SPACE)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path / "side_network", side_network())
    assert list(tmp_path.iterdir()) == []


# Reading.


def edit_description(directory: Path, **changes) -> None:
    path = directory / "qst_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, edit) -> None:
    path = directory / "side_network.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


DAMAGES = {
    "missing directory": (
        lambda f: shutil.rmtree(f),
        r"is not a QST side network.*<output_dir>/side_network\)",
    ),
    "missing description": (
        lambda f: (f / "qst_config.json").unlink(),
        "it has no qst_config.json; name a directory that qst_finetune wrote",
    ),
    "truncated description": (
        lambda f: os.truncate(f / "qst_config.json", 20),
        "qst_config.json is not valid JSON",
    ),
    "binary description": (
        lambda f: (f / "qst_config.json").write_bytes(b"\xff\xfe\x00"),
        "qst_config.json is not valid JSON",
    ),
    "list as description": (
        lambda f: (f / "qst_config.json").write_text("[]"),
        "qst_config.json is not valid JSON",
    ),
    "other method": (
        lambda f: edit_description(f, method="lora"),
        "does not describe a QST side network",
    ),
    "newer format": (
        lambda f: edit_description(f, format_version=3, qst_tune_version="9.9"),
        r"has format 3, this qst_tune .* reads format 2: install the qst_tune .* \(9\.9\)",
    ),
    "older format": (
        lambda f: edit_description(f, format_version=1),
        "has format 1, this qst_tune .* reads format 2",
    ),
    "no structure": (
        lambda f: edit_description(f, structure=None),
        r"qst_config\.json: structure is None and must be an object; copy the directory again",
    ),
    "no format": (lambda f: edit_description(f, format_version=None), "has format None"),
    "no backbone": (
        lambda f: edit_description(f, backbone=None),
        "backbone is None and must be an object",
    ),
    "missing tensors": (
        lambda f: (f / "side_network.safetensors").unlink(),
        r"side_network\.safetensors is missing: copy the whole directory",
    ),
    "truncated tensors": (
        lambda f: os.truncate(f / "side_network.safetensors", 5000),
        "is damaged or not a safetensors file",
    ),
    "empty tensors": (
        lambda f: os.truncate(f / "side_network.safetensors", 0),
        "is damaged or not a safetensors file",
    ),
    "pickle in its place": (
        lambda f: torch.save({"upsample.weight": torch.ones(1)}, f / "side_network.safetensors"),
        "is damaged or not a safetensors file",
    ),
    "tensor too few": (
        lambda f: edit_tensors(f, lambda t: t.pop("upsample.bias")),
        r"1 tensors differ, for example upsample\.bias is absent in the file and \(96,\)",
    ),
    "tensor too many": (
        lambda f: edit_tensors(f, lambda t: t.update(z=torch.ones(1))),
        r"for example z is \(1,\) in the file and absent in the model",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_directory_is_refused_and_changes_nothing(
    damage, message: str, saved: Path
) -> None:
    side = side_network()
    before = {name: value.clone() for name, value in side.state_dict().items()}
    damage(saved)
    with pytest.raises(UserError, match=message):
        load_tuned(saved, side, backbone=BACKBONE)
    assert all(torch.equal(value, before[name]) for name, value in side.state_dict().items())


def test_other_backbone_is_refused_and_both_are_named(saved: Path) -> None:
    other = replace(BACKBONE, name="other", fingerprint="ff" * 32)
    with pytest.raises(
        UserError, match=r"another backbone \(tiny\) than other: fingerprint .*ffff"
    ):
        load_tuned(saved, side_network(), backbone=other)


def test_fingerprint_of_0_1_is_accepted_as_the_weaker_check(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_tuned(saved, side_network(), backbone=BACKBONE)
    assert caplog.text == ""
    now = replace(BACKBONE, fingerprint="ee" * 32, sampled=BACKBONE.fingerprint)
    load_tuned(saved, side_network(), backbone=now)
    assert "64 values of each weight" in caplog.text
    with pytest.raises(UserError, match="was trained on another backbone"):
        load_tuned(saved, side_network(), backbone=replace(now, sampled="ff" * 32))


def test_other_quantisation_is_refused(saved: Path) -> None:
    other = replace(BACKBONE, quantization="none")
    with pytest.raises(UserError, match="quantization 'nf4' there, 'none' here"):
        load_tuned(saved, side_network(), backbone=other)


def test_renamed_checkpoint_directory_is_the_same_backbone(saved: Path) -> None:
    load_tuned(saved, side_network(), backbone=replace(BACKBONE, name="renamed"))


def test_other_heads_of_the_same_tensors_are_refused(tmp_path: Path) -> None:
    ungrouped = {"num_kv_heads": 6}
    save(tmp_path / "side", side_network(ungrouped, min_head_dim=12))
    with pytest.raises(UserError, match=r"for another model: num_heads 2 there, 1 here; .*; use"):
        load_tuned(tmp_path / "side", side_network(ungrouped), backbone=BACKBONE)


@pytest.mark.parametrize("settings", [{"reduction_factor": 8}, {"rank": 8}, {"variant": "paper"}])
def test_other_sizes_are_refused_with_an_example(settings, saved: Path) -> None:
    with pytest.raises(UserError, match=r"tensors differ, for example .* use the model block of"):
        load_tuned(saved, side_network(**settings), backbone=BACKBONE)


# Scales.

INTEGERS = BackboneId("tiny", "0123456789abcdef" * 4, "int4, per channel, rtn")
BITS = {"_component_": "tests.tiny", "bits": 4}


def model_of(**settings):
    torch.manual_seed(0)
    return peqa_decoder(tiny_backbone(), **settings)


def tuned(factor: float, **settings):
    model = model_of(**settings)
    model.load_task({name: value * factor for name, value in model.task().items()})
    return model


def save_scales(directory: Path, model) -> Path:
    save_tuned(directory, model, Provenance(INTEGERS, BITS, "epochs: 1\n", {"val_loss": 1.25}))
    return directory


@pytest.mark.parametrize("settings", [{}, {"group_size": 32}, {"train_zero_points": True}])
def test_tasks_are_exchanged_on_a_loaded_model_bit_for_bit(settings, tmp_path: Path) -> None:
    tokens = random_tokens()
    a, b = tuned(1.1, **settings), tuned(0.9, **settings)
    save_scales(tmp_path / "a", a)
    save_scales(tmp_path / "b", b)
    model = model_of(**settings)
    for name, expected in (("a", a), ("b", b), ("a", a)):
        load_tuned(tmp_path / name, model, backbone=INTEGERS)
        assert torch.equal(model(tokens), expected(tokens))


def test_the_file_holds_the_scales_and_nothing_else(tmp_path: Path) -> None:
    model = tuned(1.1)
    directory = save_scales(tmp_path / "scales", model)
    names = {"scales.safetensors", "peqa_config.json", "recipe_config.yaml", "README.md"}
    assert {path.name for path in directory.iterdir()} == names
    tensors = load_file(directory / "scales.safetensors")
    assert tensors.keys() == model.task().keys()
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    num_bytes = 4 * sum(tensor.numel() for tensor in tensors.values())
    assert 0 < (directory / "scales.safetensors").stat().st_size - num_bytes < 10_000


def test_description_and_card_say_what_it_belongs_to(tmp_path: Path) -> None:
    directory = save_scales(tmp_path / "scales", tuned(1.1))
    description = read_description(directory, SCALES)
    assert description.form is SCALES
    assert description.backbone.quantization == "int4, per channel, rtn"
    assert description.model == BITS
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
    directory, model = save_scales(tmp_path / "scales", tuned(1.1)), model_of()
    before = {name: value.detach().clone() for name, value in model.task().items()}
    with pytest.raises(UserError, match=message):
        load_tuned(directory, model, backbone=replace(INTEGERS, **changes))
    assert all(torch.equal(value, before[name]) for name, value in model.task().items())


def test_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    directory = save_scales(tmp_path / "scales", tuned(1.1))
    with pytest.raises(UserError, match=r"21 tensors differ, for example layers\.0\.attn\.k_proj"):
        load_tuned(directory, model_of(group_size=32), backbone=INTEGERS)


def test_the_directory_of_another_method_is_refused(tmp_path: Path) -> None:
    directory = save_scales(tmp_path / "scales", tuned(1.1))
    side = qst_decoder(tiny_backbone(), reduction_factor=TINY_REDUCTION).side
    with pytest.raises(UserError, match=r"it has no qst_config\.json"):
        load_tuned(directory, side, backbone=INTEGERS)
    content = json.loads((directory / "peqa_config.json").read_text())
    (directory / "peqa_config.json").write_text(json.dumps({**content, "method": "qst"}))
    with pytest.raises(UserError, match="does not describe a set of PEQA scales"):
        load_tuned(directory, model_of(), backbone=INTEGERS)
