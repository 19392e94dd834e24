"""A row that cannot be used is named before the first step, and costs no step later."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qst_tune.data.batches.checked_rows import CheckedRows
from qst_tune.data.batches.survey import RowStore
from qst_tune.errors import UserError
from tests.support.checkpoints import (
    Config,
    colour_rows,
    write_config,
)
from tests.support.nine_steps import RESUME, SETTINGS, steps_of
from tests.support.recipe_runs import finetune, run_tune


@pytest.fixture
def bad_rows(tmp_path: Path) -> Path:
    """Row 7 of 40, line 9 of the file, has no answer."""
    lines = [json.dumps(row) for row in colour_rows(40)]
    lines[7] = json.dumps({"input": "what is the colour of box 7"})
    lines.insert(2, "")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_bad_row_is_named_before_the_first_step(
    bad_rows: Path, nine_steps: Config, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        finetune(nine_steps, tmp_path / "run", f"dataset.data_files={bad_rows}")
    message = str(error.value)
    assert message.startswith(f"dataset: row 7 of {bad_rows} (line 9) cannot be used: "), message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def unkept_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read again for each batch, as those of a dataset that memory cannot hold."""
    monkeypatch.setattr(RowStore, "get", lambda store, index: None)


def fail_after(
    monkeypatch: pytest.MonkeyPatch, name: str, num_reads: int
) -> Callable[[CheckedRows, int], Any]:
    """Let reading a row of a dataset fail from some read on; returns what worked."""
    read = CheckedRows.__getitem__
    reads = iter(range(10**6))

    def fail_late(dataset: CheckedRows, index: int) -> Any:
        if dataset.name == name and next(reads) >= num_reads:
            raise UserError(f"{name}: row 3 cannot be used")
        return read(dataset, index)

    monkeypatch.setattr(CheckedRows, "__getitem__", fail_late)
    return read


@pytest.mark.usefixtures("unkept_rows")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_row_that_goes_bad_under_the_run_costs_no_complete_step(
    num_workers: int, nine_steps: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_after(monkeypatch, "dataset", 12 + 6)  # all are read before the first step
    settings = [*SETTINGS, f"num_workers={num_workers}", "save_every_n_steps=100"]
    with pytest.raises(UserError, match=r"^dataset: row 3 cannot be used$"):
        finetune(nine_steps, tmp_path / "run", *settings)
    assert steps_of(tmp_path / "run") == [1]


@pytest.mark.slow
@pytest.mark.usefixtures("unkept_rows")
def test_bad_held_out_row_costs_no_step_either(
    nine_steps: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = fail_after(monkeypatch, "dataset_val", 5 + 5 + 3)  # survey, first and second validation
    with pytest.raises(UserError, match=r"^dataset_val: row 3"):
        finetune(nine_steps, tmp_path / "run", *SETTINGS, "save_every_n_steps=100")
    assert steps_of(tmp_path / "run") == [2]
    monkeypatch.setattr(CheckedRows, "__getitem__", read)
    run = finetune(nine_steps, tmp_path / "run", *SETTINGS, RESUME)
    assert 2 in run.val_loss, "the validation that failed is made up for"


def test_bad_row_can_be_skipped(bad_rows: Path, nine_steps: Config, tmp_path: Path) -> None:
    settings = [f"dataset.data_files={bad_rows}", "on_bad_row=skip"]
    run = finetune(nine_steps, tmp_path / "run", *settings)
    assert len(run.train_loss) == 9  # of 39 rows, 4 a step
    packed = finetune(nine_steps, tmp_path / "packed", *settings, "dataset.packed=True")
    assert packed.train_loss.isfinite().all()


def test_bad_row_of_a_packed_dataset_is_named(
    bad_rows: Path, nine_steps: Config, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"^dataset: row 7 of .* \(line 9\) cannot be used: "):
        finetune(
            nine_steps,
            tmp_path / "run",
            f"dataset.data_files={bad_rows}",
            "dataset.packed=True",
        )


@pytest.mark.slow  # two processes: about 20 s on busy cores
def test_bad_row_ends_all_processes_before_the_first_step(
    nine_steps: Config, bad_rows: Path, tmp_path: Path
) -> None:
    """Each process reads all rows first; one that goes bad later is in test_distributed."""
    path = write_config(tmp_path / "config.yaml", nine_steps)
    result = run_tune(
        "run",
        "--nproc_per_node",
        "2",
        "qst_finetune",
        "--config",
        path,
        *SETTINGS,
        f"dataset.data_files={bad_rows}",
        f"output_dir={tmp_path / 'run'}",
        "shuffle=False",
        "gradient_accumulation_steps=1",
        cwd=tmp_path,
    )
    assert result.returncode != 0
    assert result.stderr.count("error: dataset: row 7 of") == 2  # one line a process
    assert not (tmp_path / "run").exists()
