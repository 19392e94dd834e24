"""Run the study: ``python -m benchmarks.study --data DIRECTORY``; see ``--help``."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.methods import default_config, ignore_known_warnings
from benchmarks.study.costs import Plan, measure_in_new_process
from benchmarks.study.experiment import Run, execute
from benchmarks.study.learners import METHODS
from benchmarks.study.page import write_page
from benchmarks.study.tasks import BATCH_SIZE, STEPS, TASKS, Task, directory_of, load_task

RESULTS = Path(__file__).parent.parent / "results" / "study.jsonl"
COSTS = RESULTS.with_name("study_costs.jsonl")
# --quick runs this part of the steps and of the held-out rows.
QUICK = 10
DEFAULT_METHODS = ["full", "lora", "qlora", "lst", "qst", "peqa"]
DOCS = Path(__file__).parent.parent.parent / "docs"


def main(arguments: list[str] | None = None) -> int:
    """Run what is not in the results yet.

    Args:
        arguments (list[str] | None): of the command line.

    Returns:
        int: exit status.
    """
    options = _parse(arguments)
    ignore_known_warnings()
    torch.set_num_threads(options.threads)
    checkpoint = Path(options.checkpoint)
    if not (checkpoint / "tokenizer.json").is_file():
        print(f"error: no model in {checkpoint}: run `make quickstart` first", file=sys.stderr)
        return 2
    directories = [directory_of(name, Path(options.data)) for name in options.tasks]
    missing = [directory.name for directory in directories if not directory.is_dir()]
    if missing:
        print(f"error: --data {options.data} has no directory {missing[0]}", file=sys.stderr)
        return 2
    if options.costs:
        return _measure_costs(options, checkpoint)
    done = read_results(options.results)
    tasks: dict[str, Task] = {}
    for run in _runs(options):
        if any(asdict(run).items() <= line.items() for line in done):
            continue
        if run.task not in tasks:
            tasks = {run.task: _load(run.task, options)}
        line = execute(run, tasks[run.task], checkpoint, options.states)
        _append(options.results, line)
        print({k: v for k, v in line.items() if k != "curve"}, flush=True)
    docs = DOCS if options.results == RESULTS else options.results.parent
    write_page(read_results(options.results), read_results(COSTS), docs)
    print(docs / "study.md")
    return 0


def _measure_costs(options: argparse.Namespace, checkpoint: Path) -> int:
    for name in options.tasks:
        size, task = options.batch_size or BATCH_SIZE[name], _load(name, options)
        plan = Plan(task, options.methods, size, options.costs, checkpoint)
        new = [asdict(cost) for cost in measure_in_new_process(plan)]
        measured = {(c["task"], c["method"], c["batch_size"]): c for c in read_results(COSTS) + new}
        COSTS.write_text("".join(json.dumps(cost) + "\n" for cost in measured.values()))
        for cost in new:
            print(cost, flush=True)
    write_page(read_results(RESULTS), read_results(COSTS), DOCS)
    return 0


def _load(name: str, options: argparse.Namespace) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    task = load_task(name, Path(options.data), tokenizer)
    if options.quick:
        return replace(task, held_out=task.held_out[: len(task.held_out) // QUICK])
    return task


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a results file.

    Args:
        path (Path): need not exist.

    Returns:
        list[dict[str, Any]]: one entry for each run.
    """
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _runs(options: argparse.Namespace) -> Iterator[Run]:
    for seed in range(options.seeds):
        for task in options.tasks:
            for name in options.methods:
                method = METHODS[name]
                rates = options.rates or [method.rates.get(task, method.rate)]
                steps = STEPS[task] if options.steps is None else options.steps
                if options.quick:
                    steps = -(-steps // QUICK)
                for rate in rates:
                    size = options.batch_size or BATCH_SIZE[task]
                    yield Run(task, name, rate, steps, seed, size)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.study", description=__doc__)
    parser.add_argument("--data", required=True, help="has sst2/, rte/, wikitext2/, alpaca/")
    parser.add_argument("--checkpoint", default=default_config().checkpointer.checkpoint_dir)
    parser.add_argument("--tasks", type=_names(TASKS), default=list(TASKS))
    parser.add_argument("--methods", type=_names(METHODS), default=DEFAULT_METHODS)
    parser.add_argument("--rates", type=lambda text: [float(r) for r in text.split(",")])
    parser.add_argument("--steps", type=int, help="default: by task, 50 to 200")
    parser.add_argument("--seeds", type=int, help="default: 3; with --quick 1")
    parser.add_argument("--batch-size", type=int, help="rows a step; default: by task, 4 to 16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--states",
        type=Path,
        help="keep the frozen backbone's states in this directory (gigabytes): variants of QST on "
        "the same data then take a few minutes each",
    )
    parser.add_argument(
        "--costs",
        type=int,
        metavar="ROUNDS",
        help="train nothing; measure time and memory of a step of every method, by turns",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="the page goes beside it; default: those in the repository, with --quick a temporary "
        "directory",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a {QUICK}th of the steps and of the held-out rows: does it run?",
    )
    options = parser.parse_args(arguments)
    if options.seeds is None:
        options.seeds = 1 if options.quick else 3
    if options.results is None:
        options.results = Path(tempfile.mkdtemp()) / RESULTS.name if options.quick else RESULTS
    return options


def _names(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
