"""The command line of the study: which runs it plans, and where they go."""

from pathlib import Path

import pytest

from benchmarks.study import __main__ as study
from benchmarks.study.learners import METHODS
from benchmarks.study.tasks import BATCH_SIZE, STEPS, TASKS


def planned(*arguments: str):
    options = study._parse(["--data", "DIRECTORY", *arguments])
    return options, list(study._runs(options))


def test_by_default_every_method_meets_every_task_with_three_seeds() -> None:
    options, runs = planned()
    assert {(r.task, r.method, r.seed) for r in runs} == {
        (task, method, seed)
        for task in TASKS
        for method in ("full", "lora", "qlora", "lst", "qst", "peqa")
        for seed in range(3)
    }
    assert all(r.steps == STEPS[r.task] and r.batch_size == BATCH_SIZE[r.task] for r in runs)
    assert options.results == study.RESULTS
    assert [r.seed for r in runs] == sorted(r.seed for r in runs), "one seed of all comes first"


def test_each_task_has_its_learning_rate_unless_rates_are_given() -> None:
    for run in planned()[1]:
        method = METHODS[run.method]
        assert run.rate == method.rates.get(run.task, method.rate)
    rates = [run.rate for run in planned("--rates", "1e-3,2e-3", "--methods", "qst")[1]]
    assert set(rates) == {1e-3, 2e-3}


def test_the_quick_form_runs_everything_once_and_leaves_the_results_alone() -> None:
    options, runs = planned("--quick")
    assert len({(r.task, r.method) for r in runs}) == len(runs) == 6 * len(TASKS)
    assert all(0 < r.steps <= STEPS[r.task] // 10 for r in runs)
    assert options.results.parent != study.RESULTS.parent
    assert not options.results.exists()
    options, runs = planned("--quick", "--seeds", "2", "--results", "mine.jsonl")
    assert options.results == Path("mine.jsonl")
    assert {run.seed for run in runs} == {0, 1}


@pytest.mark.parametrize("missing", ["model", "data"])
def test_what_is_missing_is_said_in_one_line(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing == "data":
        (tmp_path / "tokenizer.json").write_text("{}")
    status = study.main(
        ["--data", str(tmp_path), "--checkpoint", str(tmp_path), "--tasks", "rte", "--threads", "1"]
    )
    said = capsys.readouterr().err
    assert status == 2
    assert said.count("\n") == 1
    assert ("make quickstart" if missing == "model" else "has no directory rte") in said
