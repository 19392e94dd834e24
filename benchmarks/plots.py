"""The pictures of docs/benchmarks.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.methods import METHODS, REFERENCE
from benchmarks.results import Results
from benchmarks.timing import Shape

MIB = 1024**2


def write_plots(directory: Path, results: Results) -> list[Path]:
    """Draw step times and memory.

    Args:
        directory (Path): of the documentation.
        results (Results): what to draw.

    Returns:
        list[Path]: PNG files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    return [
        _draw_times(directory / "benchmarks_time.png", results),
        _draw_memory(directory / "benchmarks_memory.png", results),
    ]


def _draw_times(path: Path, results: Results) -> Path:
    from matplotlib.figure import Figure  # slow to import, and needed only here

    shape = next(iter(results.rounds))
    found = {name: results.ratio(shape, name, REFERENCE) for name in METHODS}
    names = [name for name, ratio in found.items() if ratio is not None]
    ratios = [ratio for ratio in found.values() if ratio is not None]
    medians = [ratio.median for ratio in ratios]
    whiskers = [
        [ratio.median - ratio.low for ratio in ratios],
        [ratio.high - ratio.median for ratio in ratios],
    ]
    figure = Figure(figsize=(8, 0.4 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:blue" if name.startswith("qst") else "tab:gray" for name in names]
    axes.barh(range(len(names)), medians, xerr=whiskers, color=colours, capsize=3)
    axes.set_yticks(range(len(names)), [METHODS[name].title for name in names])
    axes.invert_yaxis()
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xlabel(f"time of a training step, relative to QST; {shape} tokens, median and range")
    figure.savefig(path, dpi=120)
    return path


def _draw_memory(path: Path, results: Results) -> Path:
    from matplotlib.figure import Figure

    main = next(iter(results.rounds))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    against_batch, against_length = figure.subplots(1, 2)
    _draw_lines(
        against_batch,
        results,
        lambda s: s.batch_size if s.num_tokens == main.num_tokens else None,
        f"rows of {main.num_tokens} tokens",
    )
    _draw_lines(
        against_length,
        results,
        lambda s: s.num_tokens if s.batch_size == main.batch_size else None,
        f"tokens a row, {main.batch_size} rows",
    )
    against_batch.set_ylabel("peak memory above the frozen weights, MiB")
    for axes in (against_batch, against_length):
        if axes.get_lines():
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def _draw_lines(
    axes: Any, results: Results, position: Callable[[Shape], int | None], label: str
) -> None:
    """One line per method through the shapes that have a position."""
    for name, by_shape in results.costs.items():
        points = sorted(
            (at, (cost.peak_bytes - cost.frozen_bytes) / MIB)
            for shape, cost in by_shape.items()
            if (at := position(shape)) is not None
        )
        if len(points) > 1:
            style = "o-" if name.startswith("qst") else "s--"
            axes.plot(*zip(*points, strict=True), style, label=METHODS[name].title)
    axes.set_xlabel(label)
    axes.set_yscale("log")
    axes.grid(which="both", alpha=0.3)
