"""The results of trials: that of the best one, a table and a picture of all."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from torchtune import utils
from tqdm import tqdm

from qst_tune.atomic_files import replace_files, write_directory
from qst_tune.config.trials import TRIALS_DIRECTORY, Halving, Settings, title
from qst_tune.distributed.processes import is_main_process, rank_and_world_size
from qst_tune.errors import os_errors
from qst_tune.modules.qst_model import QSTModel
from qst_tune.results.tuned_directory import RECIPE_CONFIG
from qst_tune.training.soups import ScoredSoup, best_soup
from qst_tune.training.trials import Trial, ranked, take_turns, use_side

RESULTS_FILE, TABLE_FILE, PICTURE_FILE = "trials.json", "trials.md", "trials.png"
_MOST_PANELS = 4  # of keys that differ

log = utils.get_logger("INFO")


def fit_trials(
    directory: Path,
    model: QSTModel,
    trials: Sequence[Trial],
    halving: Halving | None = None,
    *,
    soup: bool = False,
) -> None:
    """Run all trials, and export the best one into their directory, with a table and a picture.

    With ``soup`` averages of them are scored too, and the best one is the result if it is better.
    UserError if all have failed; SystemExit after a signal, as of one run.
    """
    start = time.perf_counter()
    stop = take_turns(model, trials, halving)
    scored = best_soup(model, trials) if soup and not stop.requested else None
    if is_main_process():
        write_results(directory, trials, time.perf_counter() - start, scored)
        if scored is not None and _is_better(scored, trials):
            _export_soup(directory, model, trials, scored)
    stop.exit_if_requested()


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial with the best validated step, the first of equals; None if none has one."""
    return next(iter(ranked(trials)), None)


def _best_value(trials: Sequence[Trial]) -> float | None:
    best = best_of(trials)
    return None if best is None else best.trainer.progress.best_value


def write_results(
    directory: Path, trials: Sequence[Trial], seconds: float, scored: ScoredSoup | None = None
) -> None:
    """Write the table, the picture and the best trial's result. UserError if the disk refuses."""
    best = best_of(trials)
    monitor = trials[0].trainer.task.monitor.name
    rows = [_row(trial) for trial in trials]
    found = {
        "monitor": monitor,
        "best": best and best.number,
        "seconds": round(seconds, 3),
        "trials": rows,
        "soup": scored and {"of": scored.soup.title, **scored.figures},
    }
    table = _table(rows, monitor)
    files = {RESULTS_FILE: json.dumps(found, indent=2) + "\n", TABLE_FILE: table}
    replace_files(directory, {name: text.encode() for name, text in files.items()})
    with os_errors(f"write {directory / PICTURE_FILE}"):
        _plot(trials, directory / PICTURE_FILE)
    for line in table.splitlines():
        tqdm.write(line)
    if best is not None:
        _export(directory, best)
        log.info(_named(directory, best, monitor))


def _named(directory: Path, best: Trial, monitor: str) -> str:
    """Name the best trial, and what a config needs to load it."""
    shape = {key: value for key, value in best.settings.items() if key.startswith("model.")}
    needed = f"; this config loads it with {title(shape)}" if shape else ""
    value = best.trainer.progress.best_value
    name = best.trainer.method.result_name
    return (
        f"{directory / name}: trial {best.number} ({title(best.settings)}), the best, {monitor} "
        f"{value:.4f} at step {best.trainer.progress.best_step}{needed}"
    )


def _export(directory: Path, best: Trial) -> None:
    """Copy the best trial's result, whole or not at all."""
    name = best.trainer.method.result_name
    source = directory / TRIALS_DIRECTORY / str(best.number) / name
    with os_errors(f"read {source}"):
        files = {
            str(path.relative_to(source)): path.read_bytes()
            for path in sorted(source.rglob("*"))
            if path.is_file()
        }
    write_directory(directory / name, files, private=[RECIPE_CONFIG])


def _is_better(scored: ScoredSoup, trials: Sequence[Trial]) -> bool:
    """Whether a soup is better than each trial; logs its figure."""
    monitor = trials[0].trainer.task.monitor
    value = scored.figures[monitor.name]
    is_better = monitor.is_better(value, _best_value(trials))
    log.info(
        f"{scored.soup.title}: {monitor.name} {value:.4f}" + ("" if is_better else ", no better")
    )
    return is_better


def _export_soup(
    directory: Path, model: QSTModel, trials: Sequence[Trial], scored: ScoredSoup
) -> None:
    """Write an average in the place of the best trial's result, with the config of one of them."""
    soup = scored.soup
    method = trials[soup.number - 1].trainer.method
    use_side(model, scored.side)
    results = {f"{name}, {soup.title}": value for name, value in scored.figures.items()}
    files = method.with_other_formats(method.files(results))
    write_directory(directory / method.result_name, files, private=[RECIPE_CONFIG])
    log.info(f"{directory / method.result_name}: {soup.title}, better than each trial")


def _row(trial: Trial) -> Settings:
    trainer, progress = trial.trainer, trial.trainer.progress
    losses = list(trainer.run_log.summary.train_loss.values())
    return {
        "trial": trial.number,
        "settings": trial.settings,
        "end": _end(trial),
        "best": progress.best_value,
        "best_step": progress.best_step,
        "steps": progress.step,
        "train_loss": losses[-1] if losses else None,
        "parameters": sum(parameter.numel() for parameter in trainer.trained),
        "seconds": round(trainer.run_log.summary.seconds, 3),
    }


def _end(trial: Trial) -> str:
    """Why a trial has ended."""
    if trial.error is not None:
        return f"failed: {shorten(str(trial.error), 80, placeholder=' ...')}"
    if trial.given_up:
        return f"given up: {trial.given_up}"
    if trial.trainer.is_stopping:
        return "interrupted"
    is_whole = trial.trainer.progress.step >= trial.trainer.schedule.num_steps
    return "finished" if is_whole else "stopped early"


def _table(rows: Sequence[Settings], monitor: str) -> str:
    """A Markdown table, a line a trial, with a column for each key that differs."""
    names = list(dict.fromkeys(name for row in rows for name in row["settings"]))
    head = ["trial", *names, monitor, "at step", "steps", "parameters", "end"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        settings = [json.dumps(row["settings"][n]) if n in row["settings"] else "" for n in names]
        best = "" if row["best"] is None else f"{row['best']:.4f}"
        figures = [best, row["best_step"] or "", row["steps"], f"{row['parameters']:,}"]
        lines.append([str(row["trial"]), *settings, *map(str, figures), row["end"]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _plot(trials: Sequence[Trial], path: Path) -> None:
    """Draw each trial's figure against tokens, and the best of each against each varied key."""
    from matplotlib.figure import Figure  # slow to import, and needed only here

    names = list(dict.fromkeys(name for trial in trials for name in trial.settings))[:_MOST_PANELS]
    figure = Figure(figsize=(6 + 3.2 * len(names), 4), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(names), squeeze=False, sharey=True)[0]
    monitor = trials[0].trainer.task.monitor.name
    for trial in trials:
        progress = trial.trainer.progress
        each = progress.num_tokens / max(1, progress.step) * rank_and_world_size()[1]
        values = trial.trainer.run_log.summary.figure(monitor)
        tokens = [step * each for step in values]
        first.plot(tokens, list(values.values()), "o-", ms=3, lw=1, label=str(trial.number))
    first.set(xlabel="tokens, padding included", ylabel=monitor, ylim=_limits(trials))
    figure.legend(title="trial", fontsize=7, loc="outside right upper")
    for axes, name in zip(others, names, strict=True):
        _plot_key(axes, name, trials)
    figure.savefig(path, dpi=120)


def _limits(trials: Sequence[Trial]) -> tuple[float | None, float | None]:
    """What the picture shows of the figure: what is far worse than before training lies outside."""
    monitor = trials[0].trainer.task.monitor
    figures = [trial.trainer.run_log.summary.figure(monitor.name) for trial in trials]
    values = [value for figure in figures for value in figure.values()]
    start, lead = figures[0].get(0), _best_value(trials)
    if start is None or lead is None or start == lead:
        return None, None
    outside, beyond = start + (start - lead) / 4, lead - (start - lead) / 10
    if monitor.higher_is_better:
        return (outside if min(values) < outside else None), None
    return beyond, (outside if max(values) > outside else None)


def _plot_key(axes: Any, name: str, trials: Sequence[Trial]) -> None:
    """Draw the best figure of each trial against one key: numbers on an axis, all else as names.

    A trial that has not finished is hollow.
    """
    shown = [t for t in trials if name in t.settings and t.trainer.progress.best_value is not None]
    values = [trial.settings[name] for trial in shown]
    is_number = all(type(value) in (int, float) for value in values)
    for trial in shown:
        value, best = trial.settings[name], trial.trainer.progress.best_value
        place = (value if is_number else str(value), best)
        fill = "full" if _end(trial) == "finished" else "none"
        axes.plot(*place, "o", color="C0", fillstyle=fill)
        axes.annotate(str(trial.number), place, (4, 3), textcoords="offset points", fontsize=7)
    numbers = [float(value) for value in values] if is_number else []
    if numbers and min(numbers) > 0 and math.log10(max(numbers) / min(numbers)) >= 1:
        axes.set_xscale("log")
    axes.set_xlabel(name)
