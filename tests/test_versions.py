"""A dependency that has moved is named before an import of its old names fails."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qst_tune import versions


def test_what_ci_runs_is_inside() -> None:
    assert versions.version_problems() == []


@pytest.mark.parametrize(
    ("name", "found", "wanted"),
    [
        ("torchao", "0.18.0", "torchao<0.16,>=0.15"),
        ("torchtune", "0.7.0.dev20251201+cpu", "torchtune==0.6.1"),
        ("transformers", "4.40.2", "transformers<6,>=4.51"),
        ("torch", "2.6.0+cu124", "torch<2.14,>=2.8"),
        ("torch", "2.14.0", "torch<2.14,>=2.8"),
    ],
)
def test_version_range_and_command_are_named(
    name: str, found: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda asked: found if asked == name else version(asked)
    )
    (line,) = versions.version_problems()
    assert line.startswith(
        f"{name} {found} is installed, and qst_tune needs {wanted}: pip install '{wanted}'"
    )


def tune_beside_torchao_018(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A torchao whose import raises, as 0.18's does for the name that torchtune imports."""
    (tmp_path / "torchao-0.18.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torchao\nVersion: 0.18.0\n"
    (tmp_path / "torchao-0.18.0.dist-info" / "METADATA").write_text(metadata)
    (tmp_path / "torchao").mkdir()
    source = "import torch\nraise ImportError('int4_weight_only')"
    (tmp_path / "torchao" / "__init__.py").write_text(source)
    return subprocess.run(
        [sys.executable, "-m", "torchtune._cli.tune", *arguments],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )


def test_a_recipe_of_ours_ends_with_one_line(tmp_path: Path) -> None:
    result = tune_beside_torchao_018(tmp_path, "run", "qst_finetune", "--config", "auto/qst")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: torchao 0.18.0 is installed, and qst_tune needs torchao<0.16")


def test_other_commands_are_left_alone(tmp_path: Path) -> None:
    result = tune_beside_torchao_018(tmp_path, "ls")
    assert "qst_tune needs" not in result.stderr
    assert "int4_weight_only" in result.stderr
