"""Measure QST beside torchtune's own methods: ``python -m benchmarks``.

Step times of all methods are taken by turns in this process, memory in a process per method. The
results go to benchmarks/results/<date>.json as they come, a run that was cut short is continued by
the same command, and docs/benchmarks.md is written at the end. ``python -m benchmarks losses``
compares final losses with each optimisation on and off.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks import losses
from benchmarks.backbones import BACKBONES, Backbone
from benchmarks.costs import Cost, Job, measure_in_new_process
from benchmarks.methods import METHODS, REFERENCE, ignore_known_warnings
from benchmarks.page import write_page
from benchmarks.plots import write_plots
from benchmarks.results import OtherSettingsError, Results, machine_settings
from benchmarks.statistics import spread
from benchmarks.timing import Interleaved, Shape

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
LOSSES_FILE = "losses.json"
# The first shape is measured with all methods, the others with these.
SHAPES = "4x512,1x512,8x512,4x256,4x1024"
SWEPT = [
    *("full", "lora_best", "qlora_best", "qlora_checkpointed_best"),
    *("qst_stored", "qst_recomputed", "qst_avgpool_recomputed"),
]
QUICK = [
    *("full", "lora_best", "qlora_best", "qlora_checkpointed_best"),
    *("qst_stored", "qst_recomputed"),
]
MIB = 1024**2


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Args:
        backbone (Backbone): what is trained.
        methods (list[str]): at the first shape.
        shapes (list[Shape]): the first with all methods, the others with :data:`SWEPT`.
        rounds (int): at the first shape.
        sweep_rounds (int): at the others.
        threads (int): of torch.
    """

    backbone: Backbone
    methods: list[str]
    shapes: list[Shape]
    rounds: int
    sweep_rounds: int
    threads: int

    def methods_at(self, shape: Shape) -> list[str]:
        """Say which methods are measured at a shape.

        Args:
            shape (Shape): one of the plan's.

        Returns:
            list[str]: names.
        """
        if shape == self.shapes[0]:
            return self.methods
        return [name for name in self.methods if name in SWEPT]

    def rounds_at(self, shape: Shape) -> int:
        """Say how many rounds are measured at a shape.

        Args:
            shape (Shape): one of the plan's.

        Returns:
            int: rounds.
        """
        return self.rounds if shape == self.shapes[0] else self.sweep_rounds


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the page.

    Args:
        arguments (list[str] | None): of the command line.

    Returns:
        int: exit status.
    """
    ignore_known_warnings()
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    if options.what == "losses":
        directory: Path = options.results
        losses.run(directory / LOSSES_FILE, num_steps=options.steps, backbone_name=options.backbone)
        return 0
    try:
        plan = _plan(options)
        results = _open_results(options)
    except (ValueError, OtherSettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    measure_times(plan, results)
    failures = measure_costs(plan, results)
    _write(options, results)
    return 1 if failures else 0


# What is measured.


def measure_times(plan: Plan, results: Results) -> None:
    """Take the rounds that the results lack.

    Args:
        plan (Plan): what is wanted.
        results (Results): filled and saved round by round.
    """
    for shape in plan.shapes:  # a round without one of the methods gives way to new ones
        wanted = set(plan.methods_at(shape))
        stored = results.rounds.get(shape, [])
        results.rounds[shape] = [step for step in stored if wanted <= step.seconds.keys()]
    missing = [s for s in plan.shapes if len(results.rounds[s]) < plan.rounds_at(s)]
    if not missing:
        return
    needed = {name for shape in missing for name in plan.methods_at(shape)}
    runner = Interleaved([n for n in plan.methods if n in needed], plan.backbone, _say)
    for shape in missing:
        names, total = plan.methods_at(shape), plan.rounds_at(shape)
        _say(f"{shape}: {total} rounds of {len(names)} methods")
        runner.warm_up(names, shape)
        for step in runner.rounds(names, shape, range(len(results.rounds[shape]), total)):
            results.rounds[shape].append(step)
            results.save()
            seconds = ", ".join(f"{name} {s:.2f}" for name, s in step.seconds.items())
            _say(f"{shape}: round {len(results.rounds[shape])} of {total}, s: {seconds}")


def measure_costs(plan: Plan, results: Results) -> list[str]:
    """Measure the memory and operations that the results lack.

    Args:
        plan (Plan): what is wanted.
        results (Results): filled and saved one by one.

    Returns:
        list[str]: what failed.
    """
    failures = []
    for name in plan.methods:
        known = results.costs.setdefault(name, {})
        shapes = [s for s in plan.shapes if name in plan.methods_at(s) and s not in known]
        if not shapes:
            continue
        job = Job(name, plan.backbone, tuple(sorted(shapes, key=lambda s: s.total)), plan.threads)
        try:
            for shape, cost in measure_in_new_process(job):
                known[shape] = cost
                results.save()
                _say(_describe_cost(name, shape, cost))
        except RuntimeError as error:
            failures.append(str(error))
            _say(f"failed: {error}")
    return failures


def _describe_cost(name: str, shape: Shape, cost: Cost) -> str:
    return (
        f"{name} at {shape}: {(cost.peak_bytes - cost.frozen_bytes) / MIB:.0f} MiB above "
        f"{cost.frozen_bytes / MIB:.0f} frozen, {cost.peak_rss_bytes / MIB:.0f} MiB resident, "
        f"{cost.flops_per_token / 1e6:.0f} MFLOP/token, "
        f"{cost.product_seconds / cost.seconds:.0%} of {cost.seconds:.2f} s in products"
    )


# The command line.


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["steps", "losses"], default="steps")
    parser.add_argument("--quick", action="store_true", help="a 4-layer backbone, two minutes")
    parser.add_argument("--only", metavar="METHODS", help=f"some of {','.join(METHODS)}")
    parser.add_argument("--shapes", help=f"rows x tokens a row; default {SHAPES}")
    parser.add_argument("--rounds", type=int, help="at the first shape; default 5")
    parser.add_argument("--sweep-rounds", type=int, default=2, help="at the other shapes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backbone", choices=BACKBONES, help="default 200m")
    parser.add_argument("--steps", type=int, default=50, help="of `losses`")
    parser.add_argument("--fresh", action="store_true", help="forget the results that are there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the JSON files")
    parser.add_argument(
        "--docs",
        type=Path,
        help="directory of the page; default docs/, with --quick that of results",
    )
    options = parser.parse_args(arguments)
    options.command = shlex.join(["python", "-m", "benchmarks", *(arguments or sys.argv[1:])])
    return options


def _plan(options: argparse.Namespace) -> Plan:
    chosen = (options.only or (",".join(QUICK) if options.quick else ",".join(METHODS))).split(",")
    unknown = [name for name in chosen if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; choose from {', '.join(METHODS)}")
    methods = [name for name in METHODS if name in chosen or name == REFERENCE]
    shapes = options.shapes or ("4x128" if options.quick else SHAPES)
    return Plan(
        backbone=BACKBONES[_backbone_name(options)],
        methods=methods,
        shapes=[Shape.parse(text) for text in shapes.split(",")],
        rounds=options.rounds or (3 if options.quick else 5),
        sweep_rounds=options.sweep_rounds,
        threads=options.threads,
    )


def _backbone_name(options: argparse.Namespace) -> str:
    name: str | None = options.backbone
    return name or ("quick" if options.quick else "200m")


def _open_results(options: argparse.Namespace) -> Results:
    suffix = "-quick" if options.quick else ""
    path: Path = options.results / f"{date.today().isoformat()}{suffix}.json"
    if options.fresh:
        path.unlink(missing_ok=True)
    results = Results.open(path, machine_settings(_backbone_name(options), options.threads))
    if options.command not in results.commands:
        results.commands.append(options.command)
    if results.rounds:
        _say(f"continuing {path}")
    return results


def _write(options: argparse.Namespace, results: Results) -> None:
    docs: Path = options.docs or (options.results if options.quick else ROOT / "docs")
    losses_path: Path = options.results / LOSSES_FILE
    stored: Any = json.loads(losses_path.read_text()) if losses_path.exists() else None
    write_plots(docs, results)
    page = write_page(docs, results, stored)
    shape = next(iter(results.rounds))
    limit = spread(results.limit_gflops()).text(0)
    print(f"\nTime of a step at {shape}, relative to {REFERENCE}; machine limit {limit} GFLOP/s")
    for name, method in METHODS.items():
        ratio = results.ratio(shape, name, REFERENCE)
        if ratio is not None:
            seconds = spread(results.seconds(shape, name)).text()
            print(f"  {method.title:61s} {seconds:24s} {ratio.text()}")
    print(f"\nresults {results.path}\npage    {page}")


_START = time.perf_counter()


def _say(text: str) -> None:
    print(f"[{time.perf_counter() - _START:6.0f} s] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
