"""Which runs the study makes, from the options of the command line."""

import argparse
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.study.experiment import Run
from benchmarks.study.lines import Line, order_of
from benchmarks.study.methods import METHODS
from benchmarks.study.tasks import BATCH_SIZE, STEPS

# --quick runs this part of the steps and of the held-out rows.
QUICK = 10
# --tune tries a method's own rate and its neighbours here.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def planned_runs(options: argparse.Namespace, done: list[Line]) -> Iterator[Run]:
    """Yield the runs, one seed of all first.

    Args:
        options (argparse.Namespace): of the command line.
        done (list[Line]): the results, to which those of each run are added before the next is
            asked for: other seeds go on at the rate that was best with seed 0.

    Yields:
        Run: which may be among the results already.
    """
    for seed in range(options.seeds):
        for task in options.tasks:
            for name in options.methods:
                run = _run(options, task, name, seed)
                for rate in _rates(options, run, done):
                    yield replace(run, rate=rate)


def most_rows(options: argparse.Namespace) -> int:
    """Return how many rows the longest run trains on, counted anew in each epoch.

    Args:
        options (argparse.Namespace): of the command line.

    Returns:
        int: steps times rows a step.
    """
    pairs = [(task, name) for task in options.tasks for name in options.methods]
    runs = [_run(options, task, name, 0) for task, name in pairs]
    return max(run.steps * run.batch_size for run in runs)


def _run(options: argparse.Namespace, task: str, name: str, seed: int) -> Run:
    """The run at the method's own rate."""
    method, size = METHODS[name], options.batch_size or BATCH_SIZE[task]
    learns = method.same_as or name
    steps = STEPS[task] if options.steps is None else options.steps
    if options.rows:
        steps = options.epochs * (options.rows // size)
    if options.match == "time":
        steps = method.steps_of_equal_time(steps)
    if options.quick:
        steps = -(-steps // QUICK)
    return Run(task, learns, METHODS[learns].rate_for(task), steps, seed, size, options.rows)


def _rates(options: argparse.Namespace, run: Run, done: list[Line]) -> list[float]:
    if options.rates:
        rates: list[float] = options.rates
        return rates
    if not options.tune:
        return [run.rate]
    if not run.seed:
        place = RATES.index(run.rate)
        return [run.rate, *RATES[max(0, place - 1) : place], *RATES[place + 1 : place + 2]]
    tried = [line for line in done if _differs_in_rate(line, run)]
    return [min(tried, key=lambda line: order_of([line]))["rate"]]


def _differs_in_rate(line: Line, run: Run) -> bool:
    fixed = {**vars(run), "seed": 0}
    del fixed["rate"]
    return fixed.items() <= line.items()
