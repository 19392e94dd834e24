"""Several trials beside a run, by the time of their steps."""

import re
from pathlib import Path

import pytest

from benchmarks.trials import main
from tests.support.checkpoints import finetune_config, write_config


def test_the_command_prints_both_times_and_their_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "config.yaml", {**finetune_config(tmp_path), "seed": 0})
    main(["--config", str(path), "--trials", "3", "--steps", "2", "--rounds", "1"])
    found = re.search(r"a run (\S+) s, 3 trials (\S+) s, (\S+) times", capsys.readouterr().out)
    assert found is not None
    alone, together, ratio = map(float, found.groups())
    assert min(alone, together) > 0
    assert ratio == pytest.approx(together / alone, rel=0.2)
