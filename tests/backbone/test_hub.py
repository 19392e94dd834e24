"""Models by their hub names, through the real client against a server on loopback."""

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qst_tune.backbone.hub import fetch_model, hub_name, is_hub_name, local_model, model_name
from qst_tune.errors import UserError
from tests.support.fake_hub import COMMIT, FakeHub, serving, use

REPO = "some-org/Tiny-1.5B"
# What a repository of a model may hold besides.
UNWANTED = (
    "model.gguf", "optimizer.pt", "training_args.bin", "modeling_tiny.py", "README.md",
    "consolidated.safetensors", "original/consolidated.00.pth", "onnx/model.onnx",
    "onnx/config.json", "original/params.json", "tf_model.h5", "scheduler.bin",
)  # fmt: skip


def write(directory: Path, *names: str) -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"a": torch.ones(3)}, path, metadata={"name": name})
        else:
            path.write_text(json.dumps({"name": name}))  # equal files are cached once


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(tmp_path / "served") as fake:
        write(fake.root / REPO, "config.json", "tokenizer.json", "chat_template.jinja", *UNWANTED)
        use(monkeypatch, fake.url, tmp_path / "home")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield fake


def fetched(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


SMALL = {"config.json", "tokenizer.json", "chat_template.jinja"}


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        (["model.safetensors", "pytorch_model.bin"], {"model.safetensors"}),
        (["pytorch_model.bin"], {"pytorch_model.bin"}),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"},
        ),
    ],
)
def test_only_the_files_that_are_needed_are_fetched(
    hub: FakeHub, weights: list[str], wanted: set[str]
) -> None:
    write(hub.root / REPO, *weights)
    assert fetched(fetch_model(REPO)) == SMALL | wanted
    assert {name.removeprefix(f"{REPO}/") for name in hub.downloads} == SMALL | wanted


def test_of_two_forms_of_the_same_weights_the_indexed_shards_are_fetched(hub: FakeHub) -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    write(hub.root / REPO, *shards, "model.safetensors")
    index = hub.root / REPO / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    assert fetched(fetch_model(REPO)) == {*SMALL, *shards, index.name}


def test_the_parts_that_are_asked_for_are_fetched_and_no_more(hub: FakeHub) -> None:
    write(hub.root / REPO, "model.safetensors")
    assert fetched(fetch_model(REPO, "config")) == {"config.json"}
    assert fetched(fetch_model(REPO, "tokenizer")) == SMALL
    assert fetched(fetch_model(REPO)) == {*SMALL, "model.safetensors"}
    assert len(hub.downloads) == len(set(hub.downloads)) == 4


def test_the_cached_directory_tells_name_and_commit(hub: FakeHub) -> None:
    directory = fetch_model(REPO, "config")
    assert hub_name(directory) == f"{REPO}@{COMMIT}"
    assert hub_name(directory / "tokenizer.model") == f"{REPO}@{COMMIT}/tokenizer.model"
    assert model_name(directory) == (REPO, COMMIT)
    assert model_name(hub.root) == ("served", "")
    assert hub_name(hub.root) is None


def test_a_revision_is_a_part_of_the_name(hub: FakeHub) -> None:
    assert fetch_model(f"{REPO}@main", "config") == fetch_model(f"{REPO}@{COMMIT}", "config")
    with pytest.raises(UserError, match=r"Tiny-1.5B@v2: the model has no revision 'v2'"):
        fetch_model(f"{REPO}@v2")


def test_a_local_directory_of_that_name_goes_first(hub: FakeHub) -> None:
    assert is_hub_name(REPO)
    Path(REPO).mkdir(parents=True)
    assert not is_hub_name(REPO)
    assert local_model(REPO) == Path(REPO)
    assert not hub.downloads


@pytest.mark.parametrize("name", ["/a/b", "./a/b", "~/a", "a", "a/b/c", "a//b", "../b", "a/b c"])
def test_other_paths_are_no_hub_names(name: str) -> None:
    assert not is_hub_name(name)


# One line each, with the fix.


def problem(name: str = REPO) -> str:
    with pytest.raises(UserError) as error:
        fetch_model(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_misspelt_name_suggests_the_local_directory(hub: FakeHub) -> None:
    Path("models/Tiny-1.5B").mkdir(parents=True)
    text = problem("models/Tiny-1.5b")
    assert text.startswith("models/Tiny-1.5b: neither a directory here nor a model on the Hugging")
    assert "(did you mean the directory models/Tiny-1.5B?)" in text
    assert "hf auth login" in text


def test_a_gated_model_says_where_its_terms_are(hub: FakeHub) -> None:
    hub.gated.add(REPO)
    text = problem()
    assert f"accept its terms at {hub.url}/{REPO}" in text
    assert "hf auth login" in text


def test_a_repository_without_weights_or_config_is_named(hub: FakeHub) -> None:
    assert problem() == (
        f"{REPO} has no weights; it needs model.safetensors or pytorch_model.bin, or their shards"
    )
    (hub.root / REPO / "config.json").unlink()
    # The client keeps a commit's list of files, so as another repository.
    (hub.root / REPO).rename(hub.root / "some-org/other")
    assert "some-org/other has no config.json" in problem("some-org/other")


def test_an_unreachable_hub_is_said_so(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "home")
    text = problem()
    assert "http://127.0.0.1:9 cannot be reached" in text
    assert f"tune download {REPO} --output-dir <DIR>" in text


def test_offline_the_cache_is_used_and_what_it_lacks_is_named(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(hub.root / REPO, "model.safetensors")
    fetch_model(REPO, "tokenizer")
    use(monkeypatch, hub.url, tmp_path / "home", offline=True)
    assert fetched(fetch_model(REPO, "tokenizer")) == SMALL
    assert "HF_HUB_OFFLINE=1 forbids to download" in problem()
    use(monkeypatch, hub.url, tmp_path / "home")
    whole = fetch_model(REPO)
    use(monkeypatch, hub.url, tmp_path / "home", offline=True)
    assert fetch_model(REPO) == fetch_model(f"{REPO}@{COMMIT}") == whole


def test_several_processes_download_each_file_once(hub: FakeHub) -> None:
    write(hub.root / REPO, "model.safetensors")
    with multiprocessing.get_context("fork").Pool(3) as processes:
        directories = processes.map(fetch_model, [REPO] * 3)
    assert fetched(directories[0]) == {*SMALL, "model.safetensors"}
    assert len(set(directories)) == 1
    assert len(hub.downloads) == len(set(hub.downloads)) == 4
