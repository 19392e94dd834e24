"""Quality against time and against memory: what no other run beats in both is joined by a line."""

from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.study.lines import Line, best_rates, measured_on
from benchmarks.study.methods import BACKBONES, METHODS, settings
from benchmarks.study.tasks import BATCH_SIZE, METRICS, STEPS, TASKS, is_accuracy

PICTURE = "study_dial.png"
_MIB = 1 << 20
_LABEL: Any = {"fontsize": 6, "rotation": 35, "xytext": (2, 3), "textcoords": "offset points"}
_COLOURS = {
    **{s.name: f"C{i}" for i, backbone in enumerate(BACKBONES) for s in settings(backbone)},
    "lora": "black",
    "qlora": "gray",
}


class Point(NamedTuple):
    """A method with its steps on one task.

    ``method`` is the name under which a step was measured: recomputed or not, all rows or one;
    ``steps`` are None if they are the task's usual ones.
    """

    method: str
    minutes: float
    mib: float
    quality: float
    steps: int | None = None


def draw(lines: list[Line], costs: list[Line], path: Path) -> bool:
    """Draw a column for each task of which steps of the dial were measured.

    Args:
        lines (list[Line]): of the results file.
        costs (list[Line]): what a step of each method takes.
        path (Path): PNG file.

    Returns:
        bool: False if there was nothing to draw.
    """
    every = {task: points_of(task, lines, costs) for task in TASKS}
    tasks = [task for task, points in every.items() if points]
    if not tasks:
        return False
    figure = Figure(figsize=(5 * len(tasks), 9), layout="constrained")
    axes = figure.subplots(2, len(tasks), squeeze=False)
    for by_time, by_memory, task in zip(*axes, tasks, strict=True):
        _scatter(by_time, every[task], "minutes", task)
        _scatter(by_memory, every[task], "mib", task)
        by_time.set(title=task, xlabel="minutes of training", ylabel=METRICS[task])
        by_memory.set(xlabel="peak of a step, MiB", ylabel=METRICS[task])
    figure.savefig(path, dpi=100)
    return True


def points_of(task: str, lines: list[Line], costs: list[Line]) -> list[Point]:
    """Find the runs of the dial, of LoRA and of QLoRA of which a step was measured.

    Where the dial was measured on several devices, those of one that has most count.

    Args:
        task (str): name.
        lines (list[Line]): of the results file.
        costs (list[Line]): what a step of each method takes.

    Returns:
        list[Point]: one for each way to take the same steps; none without a step of the dial.
    """
    of_task = [
        line
        for line in lines
        if line["task"] == task
        and line["method"] in _COLOURS
        and line["steps"]
        and line["rows"] is None
        and line["batch_size"] == BATCH_SIZE[task]
    ]
    together = _measured_with_the_dial(task, costs)
    points = []
    for seeds in best_rates(of_task):
        first, quality = seeds[0], mean(line["held_out"] for line in seeds)
        steps = None if first["steps"] == STEPS[task] else first["steps"]
        for method in _ways(first["method"]):
            cost = together.get(method)
            if cost:
                minutes = first["steps"] * cost["seconds"] / 60
                mib = cost["peak_bytes"] / _MIB
                points.append(Point(method, minutes, mib, quality, steps))
    return points


def _measured_with_the_dial(task: str, costs: list[Line]) -> dict[str, Line]:
    """Costs by method: times of other devices and threads are no match."""
    usual = [c for c in costs if c["task"] == task and c["batch_size"] == BATCH_SIZE[task]]
    dial = [c for c in usual if c["method"].startswith(("dial_", "last_"))]
    if not dial:
        return {}
    ((place, _),) = Counter(measured_on(c) for c in dial).most_common(1)
    return {c["method"]: c for c in usual if measured_on(c) == place}


def frontier(points: list[Point], axis: str, *, higher_is_better: bool) -> list[Point]:
    """Choose those that are better than all that take no more.

    Args:
        points (list[Point]): of one task.
        axis (str): ``minutes`` or ``mib``.
        higher_is_better (bool): of the quality.

    Returns:
        list[Point]: from the cheapest on.
    """
    sign = 1 if higher_is_better else -1
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (getattr(p, axis), -sign * p.quality)):
        if not best or sign * point.quality > sign * best[-1].quality:
            best.append(point)
    return best


def _ways(name: str) -> list[str]:
    """All methods that learn what this one learns."""
    return [name, *(other for other, method in METHODS.items() if method.same_as == name)]


def _scatter(axes: Any, points: list[Point], axis: str, task: str) -> None:
    for point in points:
        at = getattr(point, axis), point.quality
        axes.plot(*at, "o", color=_COLOURS[METHODS[point.method].same_as or point.method])
        longer = "" if point.steps is None else f", {point.steps} steps"
        axes.annotate(point.method + longer, at, **_LABEL)
    best = frontier(points, axis, higher_is_better=is_accuracy(task))
    axes.plot([getattr(p, axis) for p in best], [p.quality for p in best], color="0.7", zorder=0)
    axes.margins(0.2)  # for the labels
    if not is_accuracy(task):
        axes.invert_yaxis()
