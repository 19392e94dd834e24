"""What this user must not read or write is one line, wherever the config names it."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from qst_tune.recipes import qst_finetune

from qst_tune.config.cli import run_recipe
from qst_tune.config.schema import TrainingConfig
from qst_tune.sharing.__main__ import main as sharing
from tests.support.checkpoints import finetune_config, write_config
from tests.support.fake_run import fake_trainer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="drops Linux's capabilities")
_CAPABILITY_VERSION_3 = 0x20080522


def as_ordinary_user(call: Callable[[], None], log: Path) -> tuple[int, str]:
    """Fork a process to which permissions apply, also if it is root's; its status and stderr."""
    process = os.fork()
    if process == 0:
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
            header, nothing = (
                (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0),
                (ctypes.c_uint32 * 6)(),
            )
            assert ctypes.CDLL(None).capset(header, nothing) == 0
            sys.stderr = sys.__stderr__  # pytest's own would be lost with this process
            call()
        except SystemExit as left:
            sys.stderr.flush()
            os._exit(int(left.code or 0))
        except BaseException as error:
            os.write(2, f"TRACEBACK {error!r}".encode())
            os._exit(99)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return status, log.read_text()


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "closed"
    (directory / "in").mkdir(parents=True)
    directory.chmod(0)
    yield directory / "in" / "x"
    directory.chmod(0o755)


KEYS = [
    "dataset.data_files",
    "checkpointer.checkpoint_dir",
    "tokenizer.path",
    "hidden_state_cache",
    "output_dir",
    "side_network",
]


@pytest.mark.parametrize("key", KEYS)
def test_closed_path_in_a_config_is_one_line(
    key: str, closed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path / "config.yaml", finetune_config(tmp_path))
    arguments = ["qst_finetune", "--config", str(path), f"output_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", [*arguments, f"{key}={closed}"])
    status, text = as_ordinary_user(
        lambda: run_recipe(qst_finetune.main, TrainingConfig), tmp_path / "log"
    )
    errors = [line for line in text.splitlines() if "rror" in line or "TRACEBACK" in line]
    assert status == 2, text
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert str(closed) in errors[0]
    causes = ("ermission denied", "not writable", "is not a writable directory", "cannot be read")
    assert any(cause in errors[0] for cause in causes)


def test_closed_result_is_one_line(closed: Path, tmp_path: Path) -> None:
    status, text = as_ordinary_user(lambda: sharing(["inspect", str(closed)]), tmp_path / "log")
    assert status == 2, text
    error = text.splitlines()[-1]
    assert error.startswith("error: cannot ")
    assert f"{closed}" in error
    assert "Permission denied" in error


def test_output_directory_that_is_closed_meanwhile_is_one_line(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path / "run", every=1)

    def close_after_step_4(number: int) -> bool:
        if number == 5:
            trainer.checkpointing.store.directory.chmod(0o555)
        return True

    object.__setattr__(trainer.checkpointing, "is_due", close_after_step_4)
    status, text = as_ordinary_user(trainer.fit, tmp_path / "log")
    trainer.checkpointing.store.directory.chmod(0o755)
    assert status == 99, text
    assert "UserError('cannot write " in text
    assert "step_00000005: Permission denied; the last good checkpoint is step 4" in text
    assert trainer.checkpointing.store.newest() == (4, [])
