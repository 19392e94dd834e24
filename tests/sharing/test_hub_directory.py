"""The directory for a hub: what is in it, what is not, and that its own snippet runs."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from qst_tune.recipes import qst_chat

from qst_tune.config.file import parse_config
from qst_tune.errors import UserError
from qst_tune.results.description import SIDE_NETWORK
from qst_tune.sharing.__main__ import main
from qst_tune.sharing.hub_directory import Publication, make_hub_directory
from tests.support.directories import side_network_directory

SUMMARY = {
    "train_loss": {"1": 3.0},
    "trainable_parameters": 184146,
    "tokens_per_second": 895.2,
    "memory_gib": {"peak": 1.34},
}


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
    qst_chat.main(parse_config([*command.split(), "max_new_tokens=3"]))
    assert capsys.readouterr().out.strip()


def test_what_cannot_be_shared_is_told(directory: Path, tmp_path: Path) -> None:
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
