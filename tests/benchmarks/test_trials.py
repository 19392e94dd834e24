"""Several trials beside a run, by the time of their steps."""

import re
from pathlib import Path

import pytest

from benchmarks.trials import main
from tests.support.checkpoints import finetune_config, write_config


def test_three_trials_take_less_than_three_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "config.yaml", {**finetune_config(tmp_path), "seed": 0})
    main(["--config", str(path), "--trials", "3", "--steps", "2", "--rounds", "1"])
    found = re.search(r"a run (\S+) s, 3 trials (\S+) s, (\S+) times", capsys.readouterr().out)
    assert found is not None
    alone, together, ratio = map(float, found.groups())
    assert 0 < alone < together
    assert ratio == pytest.approx(together / alone, rel=0.2)
