"""The page of the study, docs/study.md and its figure, drawn from the results file alone."""

from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from benchmarks.study import dial_page
from benchmarks.study.lines import (
    Costs,
    Line,
    best_rates,
    cost_of,
    costs_by_key,
    figure_of,
    measured_on,
)
from benchmarks.study.methods import METHODS
from benchmarks.study.tasks import BATCH_SIZE, METRICS, TASKS

# With what the results file has and this version no longer runs (docs/record.md).
_TITLES = {name: method.title for name, method in METHODS.items()} | {
    "inputs": "QST, reads the inputs of layers",
    "mean_gates": "QST, gates that start as a mean",
    "pruned": "QST, side blocks pruned from the backbone",
}
_INTRODUCTION = """\
# Study: what each method learns

Written by `python -m benchmarks.study --data DIRECTORY`; do not edit. SmolLM2-135M-Instruct, for
QLoRA in NF4, for QST in 8 bits (its config's) unless said otherwise, for PEQA in 4-bit integers,
for the others as it is; AdamW with warm-up and linear decay, the same rows in the same order for
every method. Several seeds: their mean (least to greatest). Where several learning rates were
tried, the table shows the best, chosen on the same validation rows for every method. Minutes are
steps times the seconds of a step in the table of costs, and MiB the peak of a step,
weights and optimizer included; a dash: not measured.
"""


def write_page(lines: list[Line], costs: list[Line], docs: Path) -> None:
    """Write ``study.md`` and ``study.png``.

    Args:
        lines (list[Line]): of the results file.
        costs (list[Line]): what a step of each method takes.
        docs (Path): the directory of the documentation.
    """
    by_key = costs_by_key(costs)
    others = [line for line in lines if not dial_page.is_shown_here(line)]
    parts = [_INTRODUCTION]
    for task in TASKS:
        groups = best_rates([line for line in others if line["task"] == task])
        if groups:
            parts.append(_table(task, groups, by_key))
    if others:
        _plot(others, by_key, docs / "study.png")
        parts.append("![Training loss](study.png)\n")
    parts.extend(dial_page.sections(lines, costs, docs))
    parts.append(_cost_table(costs))
    (docs / "study.md").write_text("\n".join(parts))


def _table(task: str, groups: list[list[Line]], costs: Costs) -> str:
    rows = [
        f"## {task}, {BATCH_SIZE[task]} rows a step unless said otherwise\n",
        f"| method | trained | learning rate | steps | {METRICS[task]} | seeds "
        "| validation loss | tokens | minutes | MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for seeds in groups:
        first = seeds[0]
        rows.append(
            f"| {_title(first)} | {first['trained']:,} | {first['rate']:g} | {first['steps']} "
            f"| {figure_of(seeds)} | {len(seeds)} "
            f"| {mean(line['held_out_loss'] for line in seeds):.4f} "
            f"| {first['tokens']:,} | {_minutes_and_memory(first, costs)} |"
        )
    return "\n".join(rows) + "\n"


def _title(line: Line) -> str:
    title = _TITLES[line["method"]]
    if not line["steps"]:
        return f"{title}, before training"
    size = line["batch_size"]
    return title if size == BATCH_SIZE[line["task"]] else f"{title}, {size} rows a step"


def _minutes_and_memory(line: Line, costs: Costs) -> str:
    cost = cost_of(line, costs)
    if cost is None or not line["steps"]:
        return "- | -"
    return f"{line['steps'] * cost['seconds'] / 60:.1f} | {cost['peak_bytes'] / 2**20:,.0f}"


def _cost_table(costs: list[Line]) -> str:
    rows = [
        "## What a step takes\n",
        "Median of steps that the methods of a task took in turn on the same batches.\n",
        "| task | method | on | rows | tokens | seconds | peak, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cost in costs:
        rows.append(
            f"| {cost['task']} | {_TITLES[cost['method']]} | {measured_on(cost)} "
            f"| {cost['batch_size']} "
            f"| {cost['tokens']:,.0f} | {cost['seconds']:.2f} "
            f"| {cost['peak_bytes'] / 2**20:,.0f} |"
        )
    return "\n".join(rows) + "\n"


def _plot(lines: list[Line], costs: Costs, path: Path) -> None:
    """Smoothed training losses of the methods' first seeds against tokens and, below, minutes."""
    tasks = [task for task in TASKS if any(line["task"] == task for line in lines)]
    figure = Figure(figsize=(5 * len(tasks), 8), layout="constrained")
    axes = figure.subplots(2, len(tasks), squeeze=False)
    for by_tokens, by_minutes, task in zip(*axes, tasks, strict=True):
        of_task = [line for line in lines if line["task"] == task and line["curve"]]
        for seeds in best_rates(of_task)[:8]:
            line = seeds[0]
            curve, cost = _smooth(line["curve"]), cost_of(line, costs)
            done = range(1, 1 + line["steps"])
            per_step = line["tokens"] / line["steps"] / 1000
            label = f"{_title(line)}, {line['steps']} steps"  # a method stands there more than once
            (drawn,) = by_tokens.plot([per_step * i for i in done], curve, label=label)
            if cost:
                minutes = [cost["seconds"] / 60 * i for i in done]
                by_minutes.plot(minutes, curve, color=drawn.get_color())
        by_tokens.set(title=task, xlabel="thousand tokens", ylabel="training loss, nats a label")
        by_minutes.set(xlabel="minutes", ylabel="training loss, nats a label")
        by_tokens.legend(fontsize=7)
    figure.savefig(path, dpi=100)


def _smooth(curve: list[float], window: int = 20) -> list[float]:
    return [mean(curve[max(0, i - window) : i + 1]) for i in range(len(curve))]
