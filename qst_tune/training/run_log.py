"""The log of a run: a progress bar, a metric logger, and a summary at the end."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torchtune import utils
from torchtune.training.metric_logging import MetricLoggerInterface
from tqdm import tqdm

from qst_tune.distributed.processes import is_main_process
from qst_tune.errors import os_errors
from qst_tune.modules.memory import GIB, memory_kind, peak_memory_bytes
from qst_tune.training.monitor import Monitor
from qst_tune.training.state_file import State

BEFORE = "quantised base model"
_TITLES = {"val_loss": "validation loss"}

log = utils.get_logger("INFO")


@dataclass
class RunSummary:
    """Figures of one run, filled while it runs; ``summary.json`` has them under these names.

    ``val_loss`` and ``metrics`` are of the validation set, by step; step 0 is before training.
    """

    train_loss: dict[int, float] = field(default_factory=dict)  # nats a token, by step
    val_loss: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)
    before: str = BEFORE  # the model of step 0
    best_step: int | None = None  # whose result was exported, by validation; None without any
    skipped_steps: int = 0  # left out because their loss or gradient was not finite
    empty_steps: int = 0  # in which no row had a label
    verdict: str | None = None  # that the run made the model no better, measured by validation
    tokens_per_second: float = 0.0  # over all steps, padding included, for one device
    trainable_parameters: int = 0  # their number
    memory_gib: dict[str, float] = field(default_factory=dict)  # peak, and the parts it consists of
    memory_kind: str = ""  # what the peak counts
    seconds: float = 0.0  # duration of training, validation included

    def results(self) -> dict[str, float]:
        """Return the figures of validation by name and step, for a model card."""
        return {
            f"{_TITLES.get(name, name)} at step {step}": value
            for name, values in {"val_loss": self.val_loss, **self.metrics}.items()
            for step, value in values.items()
        }

    def history(self) -> State:
        """Return what accumulates over the steps, to be saved with a checkpoint."""
        return {
            "train_loss": self.train_loss,
            "val_loss": self.val_loss,
            "metrics": self.metrics,
        }

    def restore(self, history: State) -> None:
        """Take :meth:`history` of the steps before a checkpoint back."""
        self.train_loss = _by_step(history["train_loss"])
        self.val_loss = _by_step(history["val_loss"])
        self.metrics = {name: _by_step(values) for name, values in history["metrics"].items()}

    def figure(self, name: str) -> dict[int, float]:
        """Return one figure of validation by step, named as a task names it; perhaps empty."""
        return self.val_loss if name == "val_loss" else self.metrics.get(name, {})

    def judge(self, monitor: Monitor, best_step: int | None) -> str | None:
        """Set ``verdict`` by comparing one figure of the validated steps with step 0.

        It stays None if the step of the result, ``best_step``, is better, or was not measured.
        """
        values = self.figure(monitor.name)
        if best_step is None or best_step not in values or 0 not in values:
            return None
        start, best, last = values[0], values[best_step], values[max(values)]
        title = _TITLES.get(monitor.name, monitor.name)
        if not monitor.is_better(best, start):
            self.verdict = (
                f"no validated step is better than the {self.before}: {title} {best:.4f} at step "
                f"{best_step}, {start:.4f} before training"
            )
        elif monitor.is_better(start, last):
            self.verdict = (
                f"the run ended worse than the {self.before}: {title} {last:.4f} at step "
                f"{max(values)}, {start:.4f} before training; the result is of step {best_step}: "
                f"{best:.4f}"
            )
        return self.verdict

    def write(self, directory: Path) -> None:
        """Write ``summary.json``, ``summary.md`` and ``loss.png`` into a directory."""
        with os_errors(f"write the summary into {directory}"):
            (directory / "summary.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
            (directory / "summary.md").write_text(self.table())
            self._plot(directory / "loss.png")

    def table(self) -> str:
        """Return the figures that the run has as a Markdown table."""
        rows: dict[str, str] = {"steps": str(max(self.train_loss, default=0))}
        if self.train_loss:
            rows["training loss, last step"] = f"{list(self.train_loss.values())[-1]:.4f}"
        rows |= {name: f"{value:.4f}" for name, value in self.results().items()}
        if self.best_step is not None:
            rows["step of the result"] = str(self.best_step)
        if self.verdict is not None:
            rows["validation"] = self.verdict
        if self.empty_steps:
            rows["steps without a label"] = str(self.empty_steps)
        rows["trainable parameters"] = f"{self.trainable_parameters:,}"
        rows["tokens/s"] = f"{self.tokens_per_second:.0f}"
        rows["seconds"] = f"{self.seconds:.0f}"
        kinds = {"peak": f" ({self.memory_kind})"} if self.memory_kind else {}
        rows |= {
            f"memory, {name}{kinds.get(name, '')}, GiB": f"{size:.3f}"
            for name, size in self.memory_gib.items()
        }
        lines = [f"| {name} | {value} |" for name, value in rows.items()]
        return "\n".join(["| figure | value |", "| --- | --- |", *lines, ""])

    def _plot(self, path: Path) -> None:
        from matplotlib.figure import Figure  # slow to import, and needed only here

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(list(self.train_loss), list(self.train_loss.values()), lw=0.8, label="training")
        if self.val_loss:
            steps, losses = list(self.val_loss), list(self.val_loss.values())
            axes.plot(steps, losses, "o-", label=f"validation (step 0: {self.before})")
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a token")
        figure.legend(loc="outside upper center", ncols=2)  # hides no step
        figure.savefig(path, dpi=120)


def _by_step(values: dict[int, float]) -> dict[int, float]:
    return {int(step): float(value) for step, value in values.items()}


@dataclass
class RunLog:
    """Prints and logs on the main process, keeps the summary on every process."""

    metric_logger: MetricLoggerInterface | None  # None on all processes except the main one
    directory: Path  # of the run
    device: torch.device  # whose memory is shown
    every: int = 1  # steps between two entries of the metric logger
    memory: bool = False  # log peak memory too
    before: str = BEFORE  # what validation at step 0 measures, for people
    title: str = ""  # of one of several runs in turn, before each line

    def __post_init__(self) -> None:
        # Short, for the progress bar.
        self.memory_name = "peak_cuda" if self.device.type == "cuda" else "peak_rss"
        self.summary = RunSummary(before=self.before)
        self.is_main = is_main_process()

    def progress(self, num_steps: int, done: int) -> Any:
        """Return a progress bar, a context manager, silent on all processes except the main one."""
        self.bar = tqdm(
            total=num_steps,
            initial=done,
            desc="training",
            disable=not self.is_main or bool(self.title),
        )
        return self.bar

    def is_due(self, step: int) -> bool:
        """Whether the metric logger gets this step, counted from 1."""
        return step % self.every == 0

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Record ``loss``, ``tokens_per_second_per_gpu`` and more of one step, counted from 1."""
        if math.isfinite(metrics["loss"]):  # JSON has no NaN
            self.summary.train_loss[step] = metrics["loss"]
        if not self.is_main:
            return
        memory = peak_memory_bytes(self.device) / GIB
        figures = {
            "loss": f"{metrics['loss']:.3f}",
            "tokens_per_s": f"{metrics['tokens_per_second_per_gpu']:.0f}",
            self.memory_name: f"{memory:.2f}GiB",
        }
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update(1)
        if self.is_due(step):
            self._log(metrics | ({"peak_memory_gib": memory} if self.memory else {}), step)

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Record figures of validation by name; step 0 is before training."""
        where = self.summary.before if step == 0 else f"step {step}"
        for name, value in figures.items():
            summary = self.summary
            by_step = summary.val_loss if name in _TITLES else summary.metrics.setdefault(name, {})
            if math.isfinite(value):  # JSON has no NaN
                by_step[step] = value
            self.report(f"{_TITLES.get(name, name)}, {where}: {value:.4f}")
        self._log(figures, step)

    def judge(self, monitor: Monitor, best_step: int | None) -> None:
        """Warn of a run that made the model no better, here and in the summary."""
        verdict = self.summary.judge(monitor, best_step)
        if verdict:
            self.report(f"warning: {verdict}")

    def report(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.is_main:
            tqdm.write(f"{self.title}{text}")

    def finish(self) -> None:
        """Write the summary."""
        if self.is_main:
            self.summary.write(self.directory)
            if self.title:
                return
            sizes = ", ".join(f"{k} {v:.3f}" for k, v in self.summary.memory_gib.items())
            log.info(f"memory, GiB (peak: {memory_kind(self.device)}): {sizes}")
            log.info(f"{self.summary.tokens_per_second:.0f} tokens/s; {self.directory}/loss.png")

    def close(self) -> None:
        """Close the metric logger."""
        if self.metric_logger is not None:
            self.metric_logger.close()

    def _log(self, metrics: dict[str, float], step: int) -> None:
        if self.metric_logger is not None and metrics:
            self.metric_logger.log_dict(metrics, step=step)
