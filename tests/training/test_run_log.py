"""The files that a run leaves for its reader."""

import json
from pathlib import Path

import pytest

from qst_tune.training.monitor import Monitor
from qst_tune.training.run_log import RunSummary


@pytest.fixture(scope="module", autouse=True)
def no_plots() -> None:
    """Here they are drawn."""


@pytest.mark.parametrize("held_out", [{}, {0: 2.5, 2: 1.25}])
def test_figures_and_plot_are_written(held_out: dict[int, float], tmp_path: Path) -> None:
    summary = RunSummary(
        train_loss={1: 3.0, 2: 2.0},
        val_loss=held_out,
        metrics={"accuracy": {2: 0.5}},
        best_step=2,
        skipped_steps=1,
        empty_steps=2,
        tokens_per_second=12.5,
        trainable_parameters=7,
        memory_gib={"peak": 0.5},
        memory_kind="CUDA allocator",
        seconds=1.5,
    )
    summary.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "summary.md", "loss.png"}
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "train_loss": {"1": 3.0, "2": 2.0},
        "val_loss": {str(step): loss for step, loss in held_out.items()},
        "metrics": {"accuracy": {"2": 0.5}},
        "before": "quantised base model",
        "best_step": 2,
        "skipped_steps": 1,
        "empty_steps": 2,
        "verdict": None,
        "tokens_per_second": 12.5,
        "trainable_parameters": 7,
        "memory_gib": {"peak": 0.5},
        "memory_kind": "CUDA allocator",
        "seconds": 1.5,
    }
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_loss_that_is_not_finite_is_drawn_too(tmp_path: Path) -> None:
    losses = {1: float("nan"), 2: float("inf")}
    RunSummary(train_loss=losses, val_loss=losses).write(tmp_path)
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_figures_are_at_full_precision(tmp_path: Path) -> None:
    RunSummary(train_loss={1: 1 / 3}).write(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["train_loss"]["1"] == 1 / 3


def test_table_has_a_row_for_each_figure() -> None:
    summary = RunSummary(
        train_loss={1: 3.0, 2: 2.0},
        val_loss={0: 2.5, 2: 1.25},
        best_step=2,
        trainable_parameters=1234,
        memory_gib={"peak": 0.5},
        memory_kind="resident process memory",
    )
    assert summary.table().splitlines() == [
        "| figure | value |",
        "| --- | --- |",
        "| steps | 2 |",
        "| training loss, last step | 2.0000 |",
        "| validation loss at step 0 | 2.5000 |",
        "| validation loss at step 2 | 1.2500 |",
        "| step of the result | 2 |",
        "| trainable parameters | 1,234 |",
        "| tokens/s | 0 |",
        "| seconds | 0 |",
        "| memory, peak (resident process memory), GiB | 0.500 |",
    ]


def test_table_reports_what_did_not_go_well() -> None:
    lines = RunSummary(empty_steps=3, verdict="no better").table().splitlines()
    assert lines[3:5] == ["| validation | no better |", "| steps without a label | 3 |"]


def test_history_comes_back() -> None:
    before = RunSummary(train_loss={1: 3.0}, val_loss={0: 2.5}, metrics={"accuracy": {0: 0.5}})
    after = RunSummary()
    after.restore(before.history())
    assert after == before


LOSS, ACCURACY = "val_loss", "accuracy"


def judge(values: dict[int, float], best_step: int | None, name: str) -> str | None:
    if name == LOSS:
        summary = RunSummary(val_loss=values)
    else:
        summary = RunSummary(metrics={name: values}, before="start")
    found = summary.judge(Monitor(name, name == ACCURACY), best_step)
    assert summary.verdict == found
    return found


@pytest.mark.parametrize(
    ("values", "best", "name"),
    [
        ({0: 2.0, 4: 1.5, 8: 1.9}, 4, LOSS),
        ({0: 0.5, 4: 0.8, 8: 0.6}, 4, ACCURACY),
        ({0: 2.0, 4: 1.5, 8: 2.0}, 4, LOSS),
        ({}, None, LOSS),
        ({4: 3.0}, 4, LOSS),
        ({0: 2.0}, None, LOSS),
        ({0: 2.0, 8: 3.0}, 4, LOSS),
    ],
    ids=["better", "more", "ends equal", "none", "no start", "no best", "best is lost"],
)
def test_what_is_better_or_was_not_measured_is_not_judged(values, best, name) -> None:
    assert judge(values, best, name) is None


@pytest.mark.parametrize(
    ("values", "best", "name", "expected"),
    [
        (
            {0: 2.0, 4: 2.5, 8: 2.25},
            8,
            LOSS,
            "no validated step is better than the quantised base model: validation loss 2.2500 at "
            "step 8, 2.0000 before training",
        ),
        (
            {0: 0.75, 4: 0.75},
            4,
            ACCURACY,
            "no validated step is better than the start: accuracy 0.7500 at step 4, 0.7500 before "
            "training",
        ),
        (
            {0: 2.0, 4: 1.5, 8: 2.25},
            4,
            LOSS,
            "the run ended worse than the quantised base model: validation loss 2.2500 at step 8, "
            "2.0000 before training; the result is of step 4: 1.5000",
        ),
        (
            {0: 0.5, 4: 0.75, 8: 0.25},
            4,
            ACCURACY,
            "the run ended worse than the start: accuracy 0.2500 at step 8, 0.5000 before "
            "training; the result is of step 4: 0.7500",
        ),
    ],
)
def test_what_is_no_better_is_named_with_both_figures(values, best, name, expected) -> None:
    assert judge(values, best, name) == expected
