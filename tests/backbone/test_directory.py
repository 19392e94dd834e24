"""Wrong and half-downloaded directories: one line each, that says what the directory is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qst_tune.backbone.directory import read_settings, weight_files
from qst_tune.errors import UserError

SHARDS = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]


def write(directory: Path, *names: str) -> Path:
    for name in names:
        if name.endswith(".safetensors"):
            save_file({"a": torch.ones(100)}, directory / name)
        else:
            (directory / name).write_text("{}")
    return directory


def write_index(directory: Path, content, name: str = "model.safetensors.index.json") -> Path:
    (directory / name).write_text(json.dumps(content))
    return directory


def names(directory: Path) -> list[str]:
    return [path.name for path in weight_files(directory)]


# What has no config.json.


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "has no config.json; it is not a Hugging Face model, or its download is not complete"),
        (("model-q4.gguf",), "has GGUF files only; name the directory of their original"),
        (
            ("adapter_config.json",),
            "is a PEFT adapter, not a model; name the directory of its base",
        ),
        (
            ("qst_config.json",),
            "is the result of a qst_tune run, not a model; name the directory of",
        ),
        (("params.json", "consolidated.00.pth"), "is in Meta's or Mistral's own format"),
    ],
)
def test_the_directory_is_named_for_what_it_is(files, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path} {message}"):
        read_settings(write(tmp_path, *files))


def test_an_adapter_says_what_its_base_model_is(tmp_path: Path) -> None:
    content = {"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}
    write_index(tmp_path, content, "adapter_config.json")
    with pytest.raises(UserError, match=r"its base model, meta-llama/Llama-3\.2-1B$"):
        read_settings(tmp_path)


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path / 'model'} does not exist; download the"):
        read_settings(tmp_path / "model")


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_config_that_is_no_object_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        read_settings(tmp_path)


# Which files hold the weights.


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["model.safetensors"], ["model.safetensors"]),
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        # Twice the same weights, or another program's.
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["consolidated.safetensors", *SHARDS], SHARDS),
        (["optimizer.safetensors", "pytorch_model.bin", "a.gguf"], ["pytorch_model.bin"]),
        (SHARDS, SHARDS),
        (["pytorch_model-1-of-1.bin"], ["pytorch_model-1-of-1.bin"]),
    ],
)
def test_the_models_own_files_are_found(files, expected, tmp_path: Path) -> None:
    assert names(write(tmp_path, *files)) == expected


def test_an_index_says_which_shards_there_are(tmp_path: Path) -> None:
    write(tmp_path, "one.safetensors", "two.safetensors", "three.safetensors")
    weight_map = {"b": "two.safetensors", "a": "one.safetensors", "c": "two.safetensors"}
    write_index(tmp_path, {"weight_map": weight_map})
    assert names(tmp_path) == ["one.safetensors", "two.safetensors"]


def test_one_file_goes_before_an_index_of_shards_as_in_transformers(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors", "one.safetensors")
    write_index(tmp_path, {"weight_map": {"a": "one.safetensors"}})
    assert names(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("has_index", [True, False])
def test_missing_shards_are_counted(has_index: bool, tmp_path: Path) -> None:
    write(tmp_path, SHARDS[1])
    if has_index:
        write_index(tmp_path, {"weight_map": dict(zip("abc", SHARDS, strict=True))})
    with pytest.raises(UserError, match=f"lacks 2 of its 3 weight files, for example {SHARDS[0]}"):
        weight_files(tmp_path)


def test_a_file_that_was_cut_off_is_found_without_reading_it(tmp_path: Path) -> None:
    path = write(tmp_path, *SHARDS) / SHARDS[2]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{SHARDS[2]} is damaged or cut off .*: download it again"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "is not an index of shards"),
        ([], "is not an index of shards"),
        ({"weight_map": {"a": "../x.safetensors"}}, "names '../x.safetensors', which is no file"),
        ({"weight_map": {"a": 3}}, "names 3, which is no file"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "names '/etc/x.safetensors', which is no"),
        ({"weight_map": {"a": "in/../../x.bin"}}, "names 'in/../../x.bin', which is no file"),
        ({"weight_map": {"a": ""}}, "names '', which is no file"),
    ],
)
def test_a_broken_index_is_named(content, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"model\.safetensors\.index\.json {message}"):
        weight_files(write_index(tmp_path, content))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json"], "has no weights; it needs model.safetensors or pytorch_model.bin"),
        (["config.json", "m.gguf"], "has GGUF files only, which cannot be read; it needs model"),
    ],
)
def test_a_directory_without_weights_is_named(files, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        weight_files(write(tmp_path, *files))
