"""The directory for a hub: what is in it, what is not, and that its own snippet runs."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from qst_tune.recipes import qst_chat

from qst_tune.config.file import parse_config
from qst_tune.errors import UserError
from qst_tune.results.description import SIDE_NETWORK
from qst_tune.sharing.__main__ import main
from qst_tune.sharing.hub_directory import Publication, make_hub_directory
from qst_tune.transformers import QSTForCausalLM
from tests.support.directories import side_network_directory
from tests.support.numbers import random_tokens

SUMMARY = {
    "train_loss": {"1": 3.0},
    "trainable_parameters": 184146,
    "tokens_per_second": 895.2,
    "memory_gib": {"peak": 1.34},
}


ROOT = Path(__file__).parents[2]


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "recipe_config.yaml"
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, **changes}))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, _ = side_network_directory(tmp_path_factory.mktemp("hub"))
    (directory.parent / "summary.json").write_text(json.dumps(SUMMARY))
    return directory


@pytest.fixture
def shared(directory: Path, tmp_path: Path) -> Path:
    """Beside a copy of the backbone that has the name it has on the hub."""
    shutil.copytree(directory.parent / "model", tmp_path / "some/tiny-model")
    target = tmp_path / "mine"
    main(
        ["share", str(directory), str(target), "--name", str(target), "--base-model",
         "some/tiny-model", "--license", "apache-2.0"]
    )  # fmt: skip
    return target


def test_nothing_in_it_names_a_path_of_this_machine(directory: Path, shared: Path) -> None:
    texts = [path.read_text() for path in shared.iterdir() if path.suffix != ".safetensors"]
    assert len(texts) == 4
    assert not any(str(directory.parent) in text for text in texts)
    config = OmegaConf.load(shared / "recipe_config.yaml")
    assert config.checkpointer.checkpoint_dir == "some/tiny-model"
    assert config.tokenizer.path == "some/tiny-model"
    assert config.dataset.data_files == "train.jsonl"
    assert json.loads((shared / "config.json").read_text())["backbone"] == "some/tiny-model"
    name = "side_network.safetensors"
    assert (shared / name).read_bytes() == (directory / name).read_bytes()


def test_a_model_that_is_built_from_a_directory_names_the_public_one(
    directory: Path, tmp_path: Path
) -> None:
    here = tmp_path / "side_network"
    shutil.copytree(directory, here)
    described = json.loads((here / SIDE_NETWORK.config_file).read_text())
    described["model"]["checkpoint_dir"] = str(tmp_path / "downloaded")
    (here / SIDE_NETWORK.config_file).write_text(json.dumps(described))
    make_hub_directory(here, tmp_path / "hub", Publication("me/side", "some/tiny-model"))
    shared = json.loads((tmp_path / "hub" / SIDE_NETWORK.config_file).read_text())
    assert shared["model"].pop("checkpoint_dir") == "some/tiny-model"
    del described["model"]["checkpoint_dir"]
    assert shared == described


@torch.no_grad()
def test_what_was_tuned_over_a_repaired_backbone_is_shared_with_its_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factors are not shared: whoever loads it computes them from the published weights."""
    directory, expected = side_network_directory(tmp_path, repair_rank=8)
    (tmp_path / "model").rename(tmp_path / "tiny-model")
    shared = tmp_path / "shared"
    make_hub_directory(directory, shared, Publication("me/side", "tiny-model"))
    card = " ".join((shared / "README.md").read_text().split())
    assert "nf4 + rank 8, scales searched (text " in card
    assert (shared / SIDE_NETWORK.weights_file).read_bytes() == (
        directory / SIDE_NETWORK.weights_file
    ).read_bytes()
    monkeypatch.chdir(tmp_path)
    loaded = QSTForCausalLM.from_pretrained(shared, dtype=torch.float32)
    tokens = random_tokens(vocab_size=300)
    assert torch.equal(loaded(input_ids=tokens).logits, expected(tokens))


def test_the_card_is_written_from_the_run(shared: Path) -> None:
    card = (shared / "README.md").read_text()
    front = OmegaConf.create(card.split("---")[1])
    assert front.base_model == "some/tiny-model"
    assert front.license == "apache-2.0"
    for row in (
        "| data | train.jsonl |",
        "| lr | 0.01 |",
        "| validation loss at step 8 | 1.25 |",
        "| trainable parameters | 184,146 |",
        "| memory, GiB: peak | 1.34 |",
    ):
        assert row in card


def test_the_snippet_of_the_card_runs_as_it_stands(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (shared / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(shared.parent)
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_the_command_of_the_card_runs_as_it_stands(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (shared / "README.md").read_text()
    (command,) = re.findall(r"^tune run qst_chat (.*)$", card, re.MULTILINE)
    (shared / "some").symlink_to(shared.parent / "some")  # a local directory of the hub's name
    monkeypatch.chdir(shared)
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is it\n"))
    built_in = str(ROOT / "configs/auto/qst_chat.yaml")
    words = command.replace("auto/qst_chat", built_in).split()
    edit_config(shared, tokenizer={"_component_": "os.system", "command": "touch ran"})
    qst_chat.main(parse_config([*words, "max_new_tokens=3"]))
    assert not (shared / "ran").exists(), "nothing of a foreign config is called"
    assert capsys.readouterr().out.strip()


def test_what_cannot_be_shared_is_reported(directory: Path, tmp_path: Path) -> None:
    publication = Publication("me/mine", "some/model")
    with pytest.raises(UserError, match="exists already"):
        make_hub_directory(directory, tmp_path, publication)
    copy = tmp_path / "classifier"
    shutil.copytree(directory, copy)
    path = copy / "qst_config.json"
    description = json.loads(path.read_text())
    description["model"]["num_labels"] = 2
    path.write_text(json.dumps(description))
    with pytest.raises(UserError, match="is a classifier"):
        make_hub_directory(copy, tmp_path / "new", publication)
    assert not (tmp_path / "new").exists()


def test_what_looks_like_a_secret_is_left_out_and_reported(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "side_network"
    shutil.copytree(directory, copy)
    dataset = {"_component_": "x.y", "token": "hf_FAKE", "max_tokens": 5, "special_tokens": "a"}
    logger = {"_component_": "x.z", "settings": [{"API_KEY": "abc"}, {"url": "http://me:pw@x/y"}]}
    edit_config(copy, dataset=dataset, metric_logger=logger, note="sk-" + "a" * 20)
    main(["share", str(copy), str(tmp_path / "new"), "--name", "me/x", "--base-model", "some/tiny"])
    out = capsys.readouterr().out
    assert "left out, 4 settings that look like secrets: dataset.token, metric_logger" in out
    assert "note" in out
    assert "warning: without --license" in out
    texts = [
        path.read_text() for path in (tmp_path / "new").iterdir() if path.suffix != ".safetensors"
    ]
    assert not any(secret in text for text in texts for secret in ("FAKE", "abc", "pw@", "sk-aa"))
    kept = yaml.safe_load((tmp_path / "new/recipe_config.yaml").read_text())
    assert kept["dataset"] == {"_component_": "x.y", "max_tokens": 5, "special_tokens": "a"}
    assert kept["tokenizer"]["_component_"]


def test_nothing_of_a_foreign_config_is_evaluated(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TOKEN", "hf_FAKE")
    copy = tmp_path / "side_network"
    shutil.copytree(directory, copy)
    edit_config(copy, model={"_component_": "x.y", "rank": "${oc.env:FAKE_TOKEN}"})
    edit_config(copy, output_dir="${oc.env:CACHE,${oc.env:HOME}/.cache}/runs/mine")
    make_hub_directory(copy, tmp_path / "new", Publication("me/side", "some/tiny-model"))
    card = (tmp_path / "new/README.md").read_text()
    assert "hf_FAKE" not in card
    assert "| model.rank | ${oc.env:FAKE_TOKEN} |" in card
    shared = yaml.safe_load((tmp_path / "new/recipe_config.yaml").read_text())
    assert shared["output_dir"] == "mine", "a directory of this machine"
