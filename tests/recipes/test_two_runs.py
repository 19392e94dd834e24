"""Two runs that are started in one output directory: one runs, the other is refused."""

import os
from pathlib import Path

import pytest
from qst_tune.recipes import qst_finetune

from qst_tune.errors import UserError
from tests.support.checkpoints import Config, finetune_config
from tests.support.recipe_runs import FinetuneResult, finetune, merged, one_thread

REFUSED = 7


def start(config: Config, output_dir: Path, log: Path) -> int:
    """Fork a run; returns its process id."""
    process = os.fork()
    if process:
        return process
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        with one_thread():
            qst_finetune.main(merged(config, f"output_dir={output_dir}", "epochs=1"))
    except UserError as error:
        log.with_suffix(".error").write_text(str(error))
        os._exit(REFUSED)
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize(
    "starts", [1, pytest.param(20, marks=pytest.mark.slow)], ids=["once", "20 times"]
)
def test_one_runs_and_one_is_refused_in_one_line(starts: int, tmp_path: Path) -> None:
    config = finetune_config(tmp_path)
    alone = finetune(config, tmp_path / "alone", "epochs=1")
    for number in range(starts):
        directory = tmp_path / f"both_{number}"
        logs = [tmp_path / f"{number}_{name}.log" for name in ("a", "b")]
        processes = [start(config, directory, log) for log in logs]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in processes]
        assert sorted(statuses) == [0, REFUSED]
        runner = processes[statuses.index(0)]
        (error,) = (path.read_text() for path in tmp_path.glob(f"{number}_*.error"))
        assert error.startswith(f"output_dir={directory} is in use by process {runner} on ")
        assert len(error.splitlines()) == 1
        run = FinetuneResult(directory)
        assert run.summary["train_loss"] == alone.summary["train_loss"]
        assert run.weights_file.read_bytes() == alone.weights_file.read_bytes()
        assert not list(directory.glob("checkpoints_before*")), "nothing is mixed"
        assert not (directory / ".lock").exists()
