"""Several trials beside a run, by the time of their steps."""

import re
from pathlib import Path

import pytest

from benchmarks import trials
from tests.support.checkpoints import finetune_config, write_config

LINE = re.compile(r"a run (\S+) s, 3 trials (\S+) s, (\S+) times")


def run(directory: Path) -> None:
    path = write_config(directory / "config.yaml", {**finetune_config(directory), "seed": 0})
    trials.main(["--config", str(path), "--trials", "3", "--steps", "2", "--rounds", "1"])


def test_a_run_and_its_trials_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    found = LINE.search(capsys.readouterr().out)
    assert found is not None
    assert float(found[3]) > 0


def test_the_ratio_is_that_of_both_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([2.0, 5.0])
    monkeypatch.setattr(trials, "measure", lambda config, overrides: next(times))
    run(tmp_path)
    found = LINE.search(capsys.readouterr().out)
    assert found is not None
    assert found.groups() == ("2.00", "5.00", "2.50")
