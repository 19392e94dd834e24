"""Which runs the command line plans."""

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.study import __main__ as study
from benchmarks.study.methods import BACKBONES, METHODS
from benchmarks.study.plan import RATES, planned_runs
from benchmarks.study.tasks import BATCH_SIZE, STEPS, TASKS


def planned(*arguments: str):
    options = study._parse(["--data", "DIRECTORY", *arguments])
    return options, list(planned_runs(options, []))


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
        assert run.rate == method.rate_for(run.task)
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


def test_equal_time_takes_the_steps_that_the_methods_products_allow() -> None:
    runs = planned("--match", "time", "--methods", "qst,dial_15,dial_15_saved,qlora_checkpointed",
        "--tasks", "wikitext2", "--seeds", "1")[1]  # fmt: skip
    assert [(r.method, r.steps) for r in runs] == [
        ("qst", 150), ("dial_15", 75), ("dial_15", 100), ("qlora", 50)
    ]  # fmt: skip


def test_what_learns_the_same_is_not_run_again() -> None:
    names = "dial_10,dial_10_saved,dial_10_by_row"
    runs = planned("--methods", names, "--tasks", "rte", "--seeds", "1")[1]
    assert len(set(runs)) == 1
    assert runs[0].rate == METHODS["dial_10"].rate_for("rte")


def test_few_rows_are_repeated_for_so_many_epochs() -> None:
    few = ("--rows", "100", "--epochs", "3", "--methods", "qst", "--seeds", "1")
    for run in planned(*few)[1]:
        assert run.rows == 100
        assert run.steps == 3 * (100 // BATCH_SIZE[run.task])


def test_every_methods_own_rates_can_be_tuned() -> None:
    own = {method.rate_for(task) for method in METHODS.values() for task in TASKS}
    assert own <= set(RATES)


def test_tuning_tries_three_rates_and_goes_on_with_the_best() -> None:
    options = study._parse(
        ["--data", "DIRECTORY", "--tune", "--methods", "qst", "--tasks", "rte,wikitext2"]
    )
    done: list[dict] = []
    rates: dict[tuple[str, int], list[float]] = {}
    for run in planned_runs(options, done):
        rates.setdefault((run.task, run.seed), []).append(run.rate)
        # On RTE, an accuracy, the highest rate is the best, on WikiText-2, a perplexity, the worst.
        done.append({**asdict(run), "held_out": run.rate})
    own = {task: METHODS["qst"].rate_for(task) for task in ("rte", "wikitext2")}
    assert rates["rte", 0] == [own["rte"], 3e-4, 3e-3]
    assert rates["wikitext2", 0] == [own["wikitext2"], 3e-3, 3e-2]
    for seed in (1, 2):
        assert rates["rte", seed] == [3e-3]
        assert rates["wikitext2", seed] == [3e-3]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_group_is_all_settings_of_the_dial(backbone: str) -> None:
    runs = planned("--methods", f"dial{backbone}", "--tasks", "rte", "--seeds", "1")[1]
    names = {run.method for run in runs}
    assert {f"qst{backbone}", f"dial_3{backbone}", f"last_30{backbone}"} <= names
    assert len(names) == 13
