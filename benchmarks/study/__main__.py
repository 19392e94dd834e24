"""Run the study: ``python -m benchmarks.study --data DIRECTORY``; see ``--help``."""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.methods import default_config, ignore_known_warnings
from benchmarks.study.costs import Plan, measure_in_new_process
from benchmarks.study.experiment import Place, Run, execute
from benchmarks.study.methods import BACKBONES, DEPTHS, GROUPS, METHODS
from benchmarks.study.page import write_page
from benchmarks.study.plan import QUICK, most_rows, planned_runs
from benchmarks.study.tasks import BATCH_SIZE, TASKS, Task, directory_of, load_task

RESULTS = Path(__file__).parent.parent / "results" / "study.jsonl"
DEFAULT_METHODS = ["full", "lora", "qlora", "lst", "qst", "peqa"]
DOCS = Path(__file__).parent.parent.parent / "docs"
# What lines of earlier versions do not have.
_FORMER = {"rows": None, "device": "cpu", "threads": 2}


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
    problem = _problem(options)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    place = Place(options.checkpoint, torch.device(options.device), options.states)
    if options.costs:
        _measure_costs(options, place)
    else:
        _execute_runs(options, place)
    docs = DOCS if options.results == RESULTS else options.results.parent
    write_page(read_results(options.results), read_results(_costs(options)), docs)
    print(docs / "study.md")
    return 0


def _problem(options: argparse.Namespace) -> str | None:
    """What is missing, in one line."""
    if not (options.checkpoint / "tokenizer.json").is_file():
        return f"no model in {options.checkpoint}: run `make quickstart` first"
    directories = [directory_of(name, options.data) for name in options.tasks]
    missing = [directory.name for directory in directories if not directory.is_dir()]
    if missing:
        return f"--data {options.data} has no directory {missing[0]}"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda finds no GPU: use --device cpu"
    largest = max(options.batch_size or BATCH_SIZE[name] for name in options.tasks)
    if options.rows is not None and options.rows < largest:
        return f"--rows {options.rows} must be at least the {largest} rows of a step"
    after, seen = options.unseen_after, options.rows or most_rows(options)
    if after is not None and (options.rows or seen > after):
        return (
            f"--unseen-after {after}: a run trains on {seen} rows; give at least so many, "
            "without --rows"
        )
    return None


def _execute_runs(options: argparse.Namespace, place: Place) -> None:
    done = read_results(options.results)
    tasks: dict[str, Task] = {}
    for run in planned_runs(options, done):
        if any(_asked(run, options).items() <= line.items() for line in done):
            continue
        if run.task not in tasks:
            tasks = {run.task: _load(run.task, options)}
        line = execute(run, tasks[run.task], place, options.unseen_after)
        done.append(line)
        _append(options.results, line)
        print({k: v for k, v in line.items() if k != "curve"}, flush=True)


def _asked(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """What a line has if it was measured as asked for."""
    after = options.unseen_after
    return asdict(run) | ({} if after is None else {"unseen_after": after})


def _measure_costs(options: argparse.Namespace, place: Place) -> None:
    path = _costs(options)
    for name in options.tasks:
        size, task = options.batch_size or BATCH_SIZE[name], _load(name, options)
        plan = Plan(task, options.methods, size, options.costs, place)
        new = [asdict(cost) for cost in measure_in_new_process(plan)]
        key = ("task", "method", "batch_size", "device", "threads")
        measured = {tuple(cost[k] for k in key): cost for cost in read_results(path) + new}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(cost) + "\n" for cost in measured.values()))
        for cost in new:
            print(cost, flush=True)


def _costs(options: argparse.Namespace) -> Path:
    results: Path = options.results
    return results.with_name(f"{results.stem}_costs.jsonl")


def _load(name: str, options: argparse.Namespace) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    task = load_task(name, options.data, tokenizer)
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
    return [{**_FORMER, **json.loads(line)} for line in path.read_text().splitlines()]


def _append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


_EPILOG = f"""\
methods: {", ".join(name for name in METHODS if not name.startswith(("dial_", "last_")))}

the depth dial: dial_K (a side network, and LoRA in the last K layers) and last_K (LoRA alone), for
K of {", ".join(map(str, DEPTHS[1:]))}, over int8, and with {" or ".join(filter(None, BACKBONES))}
behind the name. With _saved behind that a method saves its activations instead of recomputing them,
with _by_row one row runs at a time, with _by_2_rows (4, 8) so many: the same steps in another time
and memory.

several methods at once: {", ".join(GROUPS)}; qst is their K = 0
"""


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.study",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", required=True, type=Path, help="has sst2/, rte/, wikitext2/, alpaca/"
    )
    checkpoint = Path(default_config().checkpointer.checkpoint_dir)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint)
    _add_what_runs(parser)
    _add_how(parser)
    options = parser.parse_args(arguments)
    if options.seeds is None:
        options.seeds = 1 if options.quick else 3
    if options.results is None:
        options.results = Path(tempfile.mkdtemp()) / RESULTS.name if options.quick else RESULTS
    return options


def _add_what_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", type=_tasks, default=list(TASKS))
    parser.add_argument("--methods", type=_methods, default=DEFAULT_METHODS)
    parser.add_argument("--rates", type=lambda text: [float(r) for r in text.split(",")])
    parser.add_argument(
        "--tune",
        action="store_true",
        help="seed 0 tries each method's rate, a third and three times it; others take the best",
    )
    parser.add_argument("--steps", type=int, help="default: by task, 50 to 200")
    parser.add_argument(
        "--match",
        choices=["tokens", "time"],
        default="tokens",
        help="time: as many steps as fit in the time of checkpointed QLoRA's, by their products",
    )
    parser.add_argument("--rows", type=int, help="train on so few rows, in several epochs")
    parser.add_argument("--epochs", type=int, default=4, help="with --rows; default: 4")
    parser.add_argument("--seeds", type=int, help="default: 3; with --quick 1")
    parser.add_argument("--batch-size", type=int, help="rows a step; default: by task, 4 to 16")
    parser.add_argument(
        "--unseen-after",
        type=int,
        metavar="ROWS",
        help="also measure the training rows that come after so many in a run's first epoch: the "
        "same rows for all methods whose runs do not come to them",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a {QUICK}th of the steps and of the held-out rows: does it run?",
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--states",
        type=Path,
        help="keep the states of frozen layers in this directory (gigabytes): variants of QST on "
        "the same data then take a few minutes each, and with --rows later epochs less",
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
        help="costs and page go beside it; default: those in the repository, with --quick a "
        "temporary directory",
    )


def _tasks(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in TASKS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(TASKS)}")
    return names


def _methods(text: str) -> list[str]:
    names = [name for part in text.split(",") for name in GROUPS.get(part, [part])]
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"{name!r} is unknown; --help lists the methods")
    return names


if __name__ == "__main__":
    sys.exit(main())
