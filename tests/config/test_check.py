"""Mistakes of a config, all of them at once."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from qst_tune.config.check import config_problems, read_config
from qst_tune.config.keys import Key
from qst_tune.config.model_directory import check_checkpoint_dir
from qst_tune.config.schema import TrainingConfig
from qst_tune.errors import ConfigError, UserError, did_you_mean, nearest
from tests.support.checkpoints import finetune_config

KEYS = {"model": Key(kind=dict, meaning="", required=True)}
MODEL = {"_component_": "torch.nn.Linear", "in_features": 1, "out_features": 1}


def problems(config) -> list[str]:
    return [f"config: {p.text}" for p in config_problems(OmegaConf.create(config), KEYS)]


def test_right_config_passes() -> None:
    assert problems({"model": MODEL, "batch_size": 3}) == []


def test_all_mistakes_are_reported_at_once() -> None:
    assert problems({"modl": MODEL, "btch_size": 3}) == [
        "config: unknown key 'modl'; did you mean 'model'?",
        "config: unknown key 'btch_size'; did you mean 'batch_size'?",
        "config: key 'model' is missing",
    ]


def test_null_is_a_missing_value() -> None:
    assert problems({"model": None}) == ["config: key 'model' is missing"]


def test_key_that_another_value_refers_to_is_a_variable() -> None:
    config = {"model": MODEL, "cache": "/c", "output_dir": "${cache}/runs"}
    assert problems(config) == []
    assert problems({**config, "output_dir": "runs"}) == ["config: unknown key 'cache'"]


def test_interpolation_of_nothing() -> None:
    (line,) = problems({"model": MODEL, "output_dir": "${cache}/runs"})
    assert "cache" in line


def test_arguments_of_every_component_are_checked_also_in_lists() -> None:
    wrong = {**MODEL, "in_feature": 1}
    assert problems({"model": wrong, "dataset": [MODEL, wrong]}) == [
        "config: model: torch.nn.Linear takes no argument 'in_feature'; "
        "did you mean 'in_features'?",
        "config: dataset[1]: torch.nn.Linear takes no argument 'in_feature'; "
        "did you mean 'in_features'?",
    ]


def test_component_that_takes_any_argument_is_left_alone() -> None:
    assert problems({"model": {"_component_": "builtins.dict", "x": 1}}) == []


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ("no_such_package.x", "cannot be imported: No module named 'no_such_package'"),
        ("torch.nn.Lnear", "cannot be imported: No module named 'torch.nn.Lnear'"),
        ("torch.nn", "is not callable"),
        ("", "cannot be imported: Empty path"),
    ],
)
def test_component_that_is_none(component: str, message: str) -> None:
    assert problems({"model": {"_component_": component}}) == [
        f"config: model: component {component!r} {message}"
    ]


def problem_of(key: Key, value: object) -> str | None:
    problems = config_problems(OmegaConf.create({"key": value}), {"key": key})
    return problems[0].text.removeprefix(f"key={value} must be ") if problems else None


COUNT = Key(kind=int, least=1, meaning="")
SIZE = Key(kind=float, least=0, meaning="")
SHARE = Key(kind=float, above=0, most=1, meaning="")
PART = Key(kind=float, above=0, below=1, meaning="")
SWITCH = Key(kind=bool, meaning="")
MODE = Key(kind=str, choices=(0, "warn"), meaning="")
PLACE = Key(kind=Path, meaning="")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        (COUNT, [1, 2, None]),
        (SIZE, [0, 0.5, float("inf"), "inf", "1e-3", None]),
        (SHARE, [1e-9, 1, None]),
        (PART, [0.5, None]),
        (SWITCH, [True, False, None]),
        (MODE, [0, "warn", None]),
        (PLACE, ["a", "/b c", None]),
    ],
)
def test_values_that_a_key_takes_pass(key: Key, values: list[object]) -> None:
    assert [problem_of(key, value) for value in values] == [None] * len(values)


@pytest.mark.parametrize(
    ("key", "values", "rule"),
    [
        (
            COUNT,
            [0, -1, 1.5, "two", "1", True, [1], {"a": 1}],
            "a whole number of at least 1, or null",
        ),
        (SIZE, [-0.1, "x", float("nan"), True, [1.0]], "a number of at least 0, or null"),
        (SHARE, [0, 1.1, -1], "a number above 0 and of at most 1, or null"),
        (PART, [0, 1, float("nan")], "a number above 0 and below 1, or null"),
        (Key(kind=float, meaning=""), ["x"], "a number, or null"),
        (SWITCH, [1, "True", "yes"], "True or False, or null"),
        (MODE, [1, False, "error"], "0, warn or null"),
        (PLACE, [3, "", True, ["a"]], "a path, or null"),
    ],
)
def test_other_values_are_refused_with_the_rule(key: Key, values: list[object], rule: str) -> None:
    assert [problem_of(key, value) for value in values] == [rule] * len(values)


def test_nearest_name() -> None:
    assert did_you_mean("ranc", ["rank", "downsample"]) == "; did you mean 'rank'?"
    assert did_you_mean("zzz", ["rank", "downsample"]) == ""
    assert nearest("dataset_vl", ["dataset", "dataset_val"]) == "dataset_val"
    assert nearest("batch_size_train", ["batch", "batch_size", "batch_size_val"]) == "batch_size"


def test_checkpoint_directory_and_files(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    block = OmegaConf.create(
        {"checkpoint_dir": str(tmp_path), "checkpoint_files": ["a.safetensors"]}
    )
    assert check_checkpoint_dir(block) == tmp_path
    block.checkpoint_files.append("b.safetensors")
    with pytest.raises(UserError, match=f"b.safetensors is not in {tmp_path}"):
        check_checkpoint_dir(block)


@pytest.mark.parametrize(
    "files",
    [
        ["../other.safetensors"],
        ["/etc/hostname"],
        ["in/../../other.safetensors"],
        [""],
        {"filename_format": "../{}-of-{}.safetensors", "max_filename": "1"},
    ],
)
def test_files_of_a_checkpoint_do_not_leave_its_directory(files, tmp_path: Path) -> None:
    """A config may be of a directory that someone else made."""
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("other.safetensors", "1-of-1.safetensors"):
        (tmp_path / name).touch()
    block = OmegaConf.create({"checkpoint_dir": str(directory), "checkpoint_files": files})
    with pytest.raises(UserError, match=r"checkpoint_files names .*, which is no file of"):
        check_checkpoint_dir(block)


def test_files_given_by_a_pattern_must_be_there_too(tmp_path: Path) -> None:
    pattern = {"filename_format": "model-{}-of-{}.safetensors", "max_filename": "00002"}
    block = OmegaConf.create({"checkpoint_dir": str(tmp_path), "checkpoint_files": pattern})
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors is not in"):
        check_checkpoint_dir(block)
    (tmp_path / "model-00002-of-00002.safetensors").touch()
    assert check_checkpoint_dir(block) == tmp_path
    block.checkpoint_files = {"filename_format": "no placeholder", "max_filename": "1"}
    assert check_checkpoint_dir(block) == tmp_path  # the checkpointer refuses it


def test_absent_directory(tmp_path: Path) -> None:
    block = OmegaConf.create({"checkpoint_dir": str(tmp_path / "absent")})
    with pytest.raises(UserError, match=r"checkpoint_dir=.*absent does not exist"):
        check_checkpoint_dir(block)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"seed": "${batch_size}", "batch_size": "${seed}"}, "config: .*: .*[Rr]ecursive"),
        ({"dtype": "${oc.env:QST_TUNE_NOT_SET}"}, "config: dtype: .*QST_TUNE_NOT_SET"),
        ({"batch_size": 10**30}, "config: batch_size=10+ must be .* at most 9007199254740992"),
    ],
)
def test_values_that_cannot_be_resolved_or_counted_are_named(
    settings: dict[str, Any], line: str, tmp_path: Path
) -> None:
    raw = OmegaConf.create({**finetune_config(tmp_path), **settings})
    with pytest.raises(ConfigError, match=line):
        read_config(raw, TrainingConfig)
