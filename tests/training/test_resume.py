"""Whether a run may go on from a checkpoint, and what it is told."""

import math
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from qst_tune.data.batches.loader import BatchLoader
from qst_tune.errors import UserError
from qst_tune.training import resume as module
from qst_tune.training.checkpoints import CheckpointStore
from qst_tune.training.resume import (
    SavedRun,
    check_same_data,
    describe_data,
    find_saved_run,
    set_run_date,
    set_run_seed,
)
from qst_tune.training.state_file import pack_state
from tests.support.configs import typed_config

CONFIG = {
    "model": {"rank": 4},
    "dataset": [{"source": "json", "data_files": "a.jsonl", "packed": False}],
    "tokenizer": {"path": "/a", "max_seq_len": 8},
    "seed": None,
    "epochs": 1,
    "device": "cpu",
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
}
STATE: dict[str, Any] = {
    "format_version": 4,
    "config": CONFIG,
    "data": {"processes": 1},
    "seed": 7,
    "progress": {"step": 5},
    "history": {},
    "optimizer": {},
    "lr_scheduler": None,
}


def save(directory: Path, state: dict[str, Any] = STATE) -> None:
    CheckpointStore(directory / "checkpoints").save(5, pack_state(state))


def find(directory: Path, changes: dict[str, Any] | None = None) -> SavedRun | None:
    config = OmegaConf.create(
        {**CONFIG, "output_dir": str(directory), "resume_from_checkpoint": True}
    )
    return find_saved_run(typed_config(OmegaConf.merge(config, changes or {})))


def test_same_config_goes_on(tmp_path: Path) -> None:
    save(tmp_path)
    saved = find(tmp_path)
    assert saved is not None
    assert saved.state["progress"]["step"] == saved.step == 5


def test_run_that_is_not_to_resume_does_not(tmp_path: Path) -> None:
    save(tmp_path)
    assert find(tmp_path, {"resume_from_checkpoint": False}) is None


def test_seed_of_null_is_that_of_the_saved_run(tmp_path: Path) -> None:
    save(tmp_path)
    assert set_run_seed(typed_config({"seed": None}), find(tmp_path)) == 7
    assert set_run_seed(typed_config({"seed": 3}), None) == 3


def test_date_is_that_of_the_saved_runs_first_day(tmp_path: Path) -> None:
    today, first = datetime(2026, 5, 4, 3), datetime(2026, 1, 2, 3)
    tokenizer = SimpleNamespace(date=today)
    assert set_run_date(tokenizer, None) == today.isoformat()
    save(tmp_path, {**STATE, "date": first.isoformat()})
    assert set_run_date(tokenizer, find(tmp_path)) == first.isoformat()
    assert tokenizer.date == first
    assert set_run_date(object(), find(tmp_path)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 2},
        {"device": "cuda"},
        {"tokenizer": {"path": "/b"}},
        {"dataset": [{"source": "json", "data_files": ["b.jsonl"], "packed": False}]},
        {"num_workers": 3},
    ],
)
def test_harmless_change_is_reported(
    changes: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path)
    assert find(tmp_path, changes) is not None
    assert "changed since the checkpoint: " in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"rank": 8}}, r"model\.rank: 4 when saved, 8 now: the saved tensors"),
        ({"model": {"bits": 3}}, r"model\.bits: None when saved, 3 now"),
        ({"tokenizer": {"max_seq_len": 9}}, r"tokenizer\.max_seq_len: 8 when saved, 9 now"),
        ({"dataset": []}, r"dataset\[0\]\.packed: False when saved, None now"),
        ({"seed": 3}, "seed: None when saved, 3 now"),
    ],
)
def test_change_of_what_is_trained_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save(tmp_path)
    with pytest.raises(UserError, match=f"^cannot resume with (.|\n)*{message}"):
        find(tmp_path, changes)


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (1, {"batch_size": 2, "gradient_accumulation_steps": 4}),
        (2, {"batch_size": 2}),
        (4, {"batch_size": 2, "gradient_accumulation_steps": None}),
        (8, {"batch_size": 1, "gradient_accumulation_steps": 1}),
    ],
)
def test_a_steps_rows_may_be_spread_otherwise(
    processes: int,
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save(tmp_path)
    monkeypatch.setattr(module, "rank_and_world_size", lambda: (0, processes))
    assert find(tmp_path, changes) is not None
    assert f"1 processes when saved, {processes} now: each step has" in caplog.text


@pytest.mark.parametrize(
    ("processes", "changes"),
    [(2, {}), (1, {"batch_size": 2}), (1, {"gradient_accumulation_steps": 3})],
)
def test_another_number_of_rows_a_step_is_refused(
    processes: int, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    monkeypatch.setattr(module, "rank_and_world_size", lambda: (0, processes))
    with pytest.raises(UserError, match="examples a step: it was 4 x 2 x 1 when saved"):
        find(tmp_path, changes)


def test_processes_started_again_by_torchrun_go_on_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    for count, goes_on in [("0", False), ("1", True)]:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert (find(tmp_path, {"resume_from_checkpoint": False}) is not None) is goes_on


def test_all_refusals_are_reported_at_once(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(UserError) as error:
        find(tmp_path, {"model": {"rank": 8}, "seed": 3})
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({**STATE, "format_version": 1}, "its format is 1, this qst_tune reads 4"),
        ([], "its format is None"),
        (3, "its format is None"),
        ({k: v for k, v in STATE.items() if k != "seed"}, "its state has no 'seed'"),
    ],
)
def test_state_of_something_else_is_refused(state: Any, message: str, tmp_path: Path) -> None:
    save(tmp_path, state)
    with pytest.raises(UserError, match=message):
        find(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "7"}, r"its state has seed=7; restore"),
        ({"seed": -1}, r"its state has seed=-1"),
        ({"seed": 2**40}, r"its state has seed=1099511627776"),
        ({"seed": True}, r"its state has seed=True"),
        ({"progress": {"step": 6}}, r"its state is of step 6"),
        ({"progress": {"step": -5}}, r"\(ValueError: progress.step=-5\)"),
        ({"progress": {"step": "5"}}, r"\(ValueError: progress.step='5'\)"),
        ({"progress": {"step": 5, "num_tokens": 1.5}}, r"progress.num_tokens=1.5"),
        ({"progress": {"step": 5, "step_seconds": math.nan}}, r"progress.step_seconds=nan"),
        ({"progress": {"step": 5, "best_step": 9}}, r"progress.best_step=9 of 5 steps"),
        ({"progress": {"step": 5, "best_step": True}}, r"progress.best_step=True"),
        ({"progress": 3}, r"its state does not fit this run \(AttributeError"),
        ({"data": {}}, r"its state does not fit this run \(KeyError: 'processes'\)"),
        ({"data": []}, r"its state does not fit this run \(TypeError"),
        ({"config": {}}, r"."),
        ({"config": 7}, r"."),
    ],
)
def test_forged_state_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path, {**STATE, **changes})
    with pytest.raises(UserError, match=message):
        find(tmp_path)


def test_forged_date_and_data_are_one_line(tmp_path: Path) -> None:
    save(tmp_path, {**STATE, "date": "tomorrow", "data": {"processes": 1, "training set": 7}})
    saved = find(tmp_path)
    with pytest.raises(UserError, match=r"does not fit this run .ValueError: Invalid isoformat"):
        set_run_date(SimpleNamespace(date=datetime(2026, 5, 4)), saved)
    with pytest.raises(UserError, match=r"does not fit this run .TypeError"):
        check_same_data(saved, describe_data(loader([1])))


class Rows(list):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": [super().__getitem__(index)], "labels": [0]}


def loader(rows: list[int]) -> BatchLoader:
    return BatchLoader(Rows(rows), list, batch_size=1, seed=0)


def test_data_is_reported_apart_by_number_and_content(tmp_path: Path) -> None:
    rows = list(range(100))
    description = describe_data(loader(rows))
    save(tmp_path, {**STATE, "data": description})
    saved = find(tmp_path)
    assert saved is not None
    check_same_data(saved, describe_data(loader(list(rows))))
    with pytest.raises(UserError, match="its training set has 100 examples, this run's 101"):
        check_same_data(saved, describe_data(loader([*rows, 7])))
    for changed in (0, 1, 50, 99):
        others = [*rows[:changed], 700, *rows[changed + 1 :]]
        with pytest.raises(UserError, match="the training set has changed"):
            check_same_data(saved, describe_data(loader(others)))
    with pytest.raises(UserError, match="its validation set has 0 examples, this run's 1"):
        check_same_data(saved, describe_data(loader(rows), loader([1])))


def test_other_validation_rows_are_reported(tmp_path: Path) -> None:
    train = loader([1, 2])
    save(tmp_path, {**STATE, "data": describe_data(train, loader([3]))})
    saved = find(tmp_path)
    assert saved is not None
    check_same_data(saved, describe_data(train, loader([3])))
    with pytest.raises(UserError, match="the validation set has changed"):
        check_same_data(saved, describe_data(train, loader([4])))
