"""What is uploaded, and what is not: through the real client, to a server on loopback."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qst_tune.errors import UserError
from qst_tune.sharing.__main__ import main
from qst_tune.sharing.hub_directory import Publication, make_hub_directory
from qst_tune.sharing.push import push_directory
from tests.support.directories import side_network_directory
from tests.support.fake_hub import TOKEN, FakeHub, serving, use

NAME = "me/pythonic"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the run left it, with paths of this machine."""
    return side_network_directory(tmp_path_factory.mktemp("push"))[0]


@pytest.fixture
def ready(run: Path, tmp_path: Path) -> Path:
    make_hub_directory(run, tmp_path / "ready", Publication(NAME, "some/model"))
    return tmp_path / "ready"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(tmp_path / "served") as fake:
        use(monkeypatch, fake.url, tmp_path / "home")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield fake


def test_the_files_arrive_and_the_address_is_printed(
    hub: FakeHub, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["push", str(ready), NAME])
    assert hub.commits[NAME] == {path.name: path.read_bytes() for path in ready.iterdir()}
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("me", "pythonic")
    assert not {"visibility", "private"} & created.keys()  # as the account's settings have it
    output = capsys.readouterr()
    assert f"{hub.url}/{NAME}" in output.out
    assert TOKEN not in output.out + output.err
    assert not any(TOKEN.encode() in content for content in hub.commits[NAME].values())


def test_a_new_repository_is_private_if_asked(hub: FakeHub, ready: Path) -> None:
    push_directory(ready, NAME, private=True)
    (created,) = hub.created
    assert created.get("visibility") == "private" or created.get("private") is True


# Refused, one line each, and nothing is sent.


def problem(directory: Path, name: str = NAME) -> str:
    with pytest.raises(UserError) as error:
        push_directory(directory, name)
    assert "\n" not in str(error.value)
    assert TOKEN not in str(error.value)
    return str(error.value)


def test_paths_of_this_machine_are_refused(hub: FakeHub, run: Path) -> None:
    text = problem(run)
    assert str(run.parent) in text
    assert "sharing share" in text
    assert not hub.created


@pytest.mark.parametrize("path", ["/home/me/rows.jsonl", "~/rows.jsonl", "C:\\Users\\me"])
@pytest.mark.parametrize("file", ["README.md", "recipe_config.yaml"])
def test_a_path_in_any_text_is_found(hub: FakeHub, ready: Path, file: str, path: str) -> None:
    with (ready / file).open("a") as text:
        text.write(f"\n# from {path}\n")
    assert f"{file} has a path of this machine, {path[:7]}" in problem(ready)


def test_other_files_are_refused(hub: FakeHub, ready: Path) -> None:
    (ready / "notes.txt").write_text("mine")
    assert "such as notes.txt" in problem(ready)
    assert not hub.created


def test_what_is_no_whole_result_is_refused(hub: FakeHub, ready: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is no result of qst_tune" in problem(tmp_path / "empty")
    weights = ready / "side_network.safetensors"
    tensors = load_file(weights)
    tensors["upsample.weight"] = torch.full_like(tensors["upsample.weight"], torch.nan)
    save_file(tensors, weights)
    assert "1 tensors are not finite, such as upsample.weight" in problem(ready)
    weights.unlink()
    assert "is missing: copy the whole directory" in problem(ready)
    assert not hub.created


def test_a_classifier_is_refused(hub: FakeHub, ready: Path, tmp_path: Path) -> None:
    copy = tmp_path / "classifier"
    shutil.copytree(ready, copy)
    description = json.loads((copy / "qst_config.json").read_text())
    description["model"]["num_labels"] = 2
    (copy / "qst_config.json").write_text(json.dumps(description))
    assert "is a classifier" in problem(copy)


def test_names_of_another_form_are_refused(hub: FakeHub, ready: Path) -> None:
    for name in ("pythonic", "/me/pythonic", "me/pythonic/2", "me/../x", ""):
        assert "is not of the form org/name" in problem(ready, name)


def test_without_a_token_a_right_or_a_network_it_says_so(
    hub: FakeHub, ready: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.read_only.add("others")
    assert "the token may not write there" in problem(ready, "others/pythonic")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "does not accept the token: log in with `hf auth login`" in problem(ready)
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token of the Hugging Face Hub: log in" in problem(ready)
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "home")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "http://127.0.0.1:9 cannot be reached" in problem(ready)
    use(monkeypatch, hub.url, tmp_path / "home", offline=True)
    assert "HF_HUB_OFFLINE=1 forbids uploads" in problem(ready)


def test_the_adapter_of_lora_alone_is_shared_under_the_public_name(
    hub: FakeHub, tmp_path: Path
) -> None:
    alone = {"num_side_blocks": 0, "lora_layers": 2, "lora_rank": 2}
    directory, _ = side_network_directory(tmp_path, **alone)
    ready = tmp_path / "ready"
    make_hub_directory(directory, ready, Publication(NAME, "some/model"))
    push_directory(ready, NAME)
    inside = [path for path in ready.rglob("*") if path.is_file()]
    sent = hub.commits[NAME]
    assert sent == {str(path.relative_to(ready)): path.read_bytes() for path in inside}
    config = json.loads(sent["peft/adapter_config.json"])
    assert config["base_model_name_or_path"] == "some/model"
    adapter = "peft/adapter_model.safetensors"
    assert sent[adapter] == (directory / adapter).read_bytes()
    card = sent["README.md"].decode()
    assert "[LoRA](https://arxiv.org/abs/2106.09685) in the last 2 of 3 layers" in card
    assert f'PeftModel.from_pretrained(base, "{NAME}", subfolder="peft")' in card
    (ready / adapter).write_bytes(b"damaged")
    assert "adapter_model.safetensors is missing or damaged" in problem(ready)
