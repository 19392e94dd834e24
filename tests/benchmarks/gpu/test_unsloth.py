"""Unsloth runs in a process of its own, whose failure is a row and not the end."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import unsloth
from benchmarks.gpu.bench import Bench


@pytest.mark.skipif(find_spec("unsloth") is not None, reason="Unsloth is installed")
def test_without_the_package_the_row_names_it() -> None:
    (row,) = unsloth.unsloth(Bench(tiny=True, rounds=1))
    assert row["method"] == unsloth.UNSLOTH
    assert row["error"] == "ModuleNotFoundError: No module named 'unsloth'"


def test_a_process_that_takes_too_long_is_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(unsloth, "LIMIT_S", 0.2)
    monkeypatch.setattr(unsloth.sys, "executable", _sleeper(tmp_path))
    lines, error = unsloth.output_of(str(tmp_path))
    assert lines == ['{"ms": 1}']
    assert error == "TimeoutError: stopped after 0.2 s"


def _sleeper(directory: Path) -> str:
    program = directory / "sleeper"
    program.write_text("#!/bin/sh\necho '{\"ms\": 1}'\nexec sleep 30\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
def test_with_the_package_a_step_is_measured() -> None:
    pytest.importorskip("unsloth")
    rows = list(unsloth.unsloth(Bench(tiny=True, rounds=1)))
    assert rows[0]["ms"] > 0
