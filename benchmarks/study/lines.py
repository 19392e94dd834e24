"""Lines of the results, grouped as pages show them."""

from collections import defaultdict
from statistics import mean
from typing import Any

from benchmarks.study.tasks import is_accuracy

Line = dict[str, Any]


def order_of(seeds: list[Line]) -> float:
    """Return what is lower the better the mean of the seeds is.

    Args:
        seeds (list[Line]): runs of one task that differ in nothing else.

    Returns:
        float: the task's metric, negative where higher is better.
    """
    sign = -1 if is_accuracy(seeds[0]["task"]) else 1
    return sign * float(mean(line["held_out"] for line in seeds))


def best_rates(lines: list[Line]) -> list[list[Line]]:
    """Group the runs of a task by all but rate and seed, each group at its best learning rate.

    Args:
        lines (list[Line]): runs of one task.

    Returns:
        list[list[Line]]: the seeds of each group, best first; of a run that was made twice, on a
        CPU and on a GPU, the newest. The best rate is that of seed 0, with
        which all rates are tried: the mean of more seeds is no match for the best of one.
    """
    groups: dict[Any, dict[float, dict[int, Line]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        key = tuple(line[name] for name in ("method", "steps", "batch_size", "rows"))
        groups[key][line["rate"]][line["seed"]] = line

    def order(seeds: list[Line]) -> float:
        return order_of([line for line in seeds if line["seed"] == 0] or seeds)

    return sorted(
        (
            min((list(seeds.values()) for seeds in rates.values()), key=order)
            for rates in groups.values()
        ),
        key=order_of,
    )


Costs = dict[Any, Line]


def costs_by_key(costs: list[Line]) -> Costs:
    """Index the costs of steps for :func:`cost_of`.

    Args:
        costs (list[Line]): of the file of costs.

    Returns:
        Costs: by task, method, rows a step and device; with the most threads.
    """
    ascending = sorted(costs, key=lambda cost: cost["threads"])
    return {(c["task"], c["method"], c["batch_size"], c["device"]): c for c in ascending}


def cost_of(line: Line, costs: Costs) -> Line | None:
    """Find what a step of a run took.

    Args:
        line (Line): of the results.
        costs (Costs): all.

    Returns:
        Line | None: None where it was not measured.
    """
    return costs.get((line["task"], line["method"], line["batch_size"], line["device"]))


def measured_on(cost: Line) -> str:
    """Name what a step was measured on: times of one thread and of two are no match.

    Args:
        cost (Line): of the file of costs.

    Returns:
        str: a device, with the threads of a CPU.
    """
    if cost["device"] == "cuda":
        return "cuda"
    return "cpu, 1 thread" if cost["threads"] == 1 else f"cpu, {cost['threads']} threads"


def figure_of(seeds: list[Line]) -> str:
    """Write the mean of the seeds and, of several, the least and the greatest.

    Args:
        seeds (list[Line]): runs that differ in nothing else.

    Returns:
        str: in the task's metric.
    """
    values = [line["held_out"] for line in seeds]
    digits = 1 if is_accuracy(seeds[0]["task"]) else 3
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if seeds[1:] else ""
    return f"{mean(values):.{digits}f}{spread}"
