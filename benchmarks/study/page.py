"""The page of the study, docs/study.md and its figure, drawn from the results file alone."""

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.study.learners import METHODS
from benchmarks.study.tasks import BATCH_SIZE, TASKS

Line = dict[str, Any]

_METRICS = {
    "sst2": "accuracy, %",
    "rte": "accuracy, %",
    "wikitext2": "perplexity",
    "alpaca": "loss, nats a token",
}
_HIGHER_IS_BETTER = ("sst2", "rte")
_INTRODUCTION = """\
# Study: what each method learns

Written by `python -m benchmarks.study --data FOLDER`; do not edit. SmolLM2-135M-Instruct, for
QLoRA in NF4, for QST in 8 bits (its config's) unless said otherwise; AdamW with warm-up and linear
decay, the same rows in the same order for every method, one seed a run. Where several learning
rates were tried, the table shows the best, chosen on the same held-out rows for every method.
Speeds are in [benchmarks.md](benchmarks.md).
"""


def write_page(lines: list[Line], docs: Path) -> None:
    """Write ``study.md`` and ``study.png``.

    Args:
        lines (list[Line]): of the results file.
        docs (Path): the folder of the documentation.
    """
    parts = [_INTRODUCTION]
    for task in TASKS:
        groups = best_rates([line for line in lines if line["task"] == task], task)
        if groups:
            parts.append(_table(task, groups))
    parts.append("![Training loss](study.png)\n")
    (docs / "study.md").write_text("\n".join(parts))
    _plot(lines, docs / "study.png")


def best_rates(lines: list[Line], task: str) -> list[list[Line]]:
    """Group the runs of a task by method and steps, each at its best learning rate.

    Args:
        lines (list[Line]): runs of one task.
        task (str): its name.

    Returns:
        list[list[Line]]: the seeds of each method and number of steps, best first.
    """
    by_rate: dict[tuple[str, int], dict[float, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        by_rate[line["method"], line["steps"]][line["rate"]].append(line)
    sign = -1 if task in _HIGHER_IS_BETTER else 1

    def order(seeds: list[Line]) -> float:
        return sign * float(mean(line["held_out"] for line in seeds))

    return sorted((min(rates.values(), key=order) for rates in by_rate.values()), key=order)


def _table(task: str, groups: list[list[Line]]) -> str:
    rows = [
        f"## {task}, {BATCH_SIZE[task]} rows a step\n",
        f"| method | trained | learning rate | steps | {_METRICS[task]} | seeds "
        "| held-out loss | tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for seeds in groups:
        first = seeds[0]
        values = [line["held_out"] for line in seeds]
        digits = 1 if task in _HIGHER_IS_BETTER else 3
        spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if seeds[1:] else ""
        title = METHODS[first["method"]].title
        rows.append(
            f"| {title if first['steps'] else title + ', before training'} "
            f"| {first['trained']:,} | {first['rate']:g} | {first['steps']} "
            f"| {mean(values):.{digits}f}{spread} | {len(seeds)} "
            f"| {mean(line['held_out_loss'] for line in seeds):.4f} "
            f"| {first['tokens']:,} |"
        )
    return "\n".join(rows) + "\n"


def _plot(lines: list[Line], path: Path) -> None:
    """Smoothed training losses, the first seed of the eight best methods of each task."""
    tasks = [task for task in TASKS if any(line["task"] == task for line in lines)]
    figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        of_task = [line for line in lines if line["task"] == task and line["curve"]]
        for seeds in best_rates(of_task, task)[:8]:
            line = seeds[0]
            per_step = line["tokens"] / line["steps"] / 1000
            tokens = [per_step * (i + 1) for i in range(line["steps"])]
            axis.plot(tokens, _smooth(line["curve"]), label=METHODS[line["method"]].title)
        axis.set(title=task, xlabel="thousand tokens", ylabel="training loss, nats a label")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)


def _smooth(curve: list[float], window: int = 20) -> list[float]:
    return [mean(curve[max(0, i - window) : i + 1]) for i in range(len(curve))]
