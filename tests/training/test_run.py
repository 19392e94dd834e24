from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from qst_tune.errors import UserError
from qst_tune.training.run import run_environment
from tests.support.configs import typed_config


def config(directory: Path, **changes):
    return typed_config({"device": "cpu", "dtype": "bf16", "output_dir": str(directory), **changes})


def test_it_gives_device_and_dtype_and_makes_the_directory(tmp_path: Path) -> None:
    with run_environment(config(tmp_path / "run")) as place:
        assert place == (torch.device("cpu"), torch.bfloat16)
        assert (tmp_path / "run").is_dir()
        assert not dist.is_initialized()  # one process needs no group


def test_a_run_that_fails_before_it_wrote_anything_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError), run_environment(config(tmp_path / "run")):
        raise UserError("no such data")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_makes_no_directory(tmp_path: Path) -> None:
    with run_environment(config(tmp_path / "run", dry_run=True)):
        assert list(tmp_path.iterdir()) == []


def test_a_wrong_dtype_is_refused_before_the_directory_is_made(tmp_path: Path) -> None:
    wrong = config(tmp_path / "run", dtype="fp8")
    with pytest.raises(UserError, match="dtype=fp8"), run_environment(wrong):
        pass
    assert list(tmp_path.iterdir()) == []
