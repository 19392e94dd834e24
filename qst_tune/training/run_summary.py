"""What a run leaves for its reader: figures as JSON and Markdown, and a picture of the loss."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SUMMARY_FILE = "summary.json"
TABLE_FILE = "summary.md"
PLOT_FILE = "loss.png"
BEFORE = "quantised base model"
_HISTORY = ("train_loss", "held_out_loss", "metrics")


@dataclass
class RunSummary:
    """Figures of one run, filled while it runs.

    Args:
        train_loss (dict[int, float]): nats a token, by step.
        held_out_loss (dict[int, float]): of validation, nats a token, by step; step 0 is before
            training.
        metrics (dict[str, dict[int, float]]): other figures of validation, by name and step.
        before (str): what step 0 is.
        best_step (int | None): whose result was exported, by validation; None without any.
        skipped_steps (int): left out because their loss or gradient was not finite.
        empty_steps (int): in which no row had a label.
        verdict (str | None): that the run made the model no better, measured by validation; None
            if it did, or nothing was measured.
        tokens_per_second (float): over all steps, padding included, for one device.
        trainable_parameters (int): their number.
        memory_gib (dict[str, float]): peak, and the parts it consists of.
        memory_kind (str): what the peak counts.
        seconds (float): duration of training, validation included.
    """

    train_loss: dict[int, float] = field(default_factory=dict)
    held_out_loss: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)
    before: str = BEFORE
    best_step: int | None = None
    skipped_steps: int = 0
    empty_steps: int = 0
    verdict: str | None = None
    tokens_per_second: float = 0.0
    trainable_parameters: int = 0
    memory_gib: dict[str, float] = field(default_factory=dict)
    memory_kind: str = ""
    seconds: float = 0.0

    def results(self) -> dict[str, float]:
        """Return the figures of validation by name and step, for a model card."""
        figures = {"validation loss": self.held_out_loss, **self.metrics}
        return {
            f"{name} at step {step}": value
            for name, values in figures.items()
            for step, value in values.items()
        }

    def history(self) -> dict[str, Any]:
        """Return what accumulates over the steps, to be saved with a checkpoint."""
        return {name: getattr(self, name) for name in _HISTORY}

    def restore(self, history: dict[str, Any]) -> None:
        """Take :meth:`history` of the steps before a checkpoint back."""
        for name in _HISTORY:
            setattr(self, name, history[name])

    def figure(self, name: str) -> dict[int, float]:
        """Return one figure of validation by step, named as a task names it; perhaps empty."""
        return self.held_out_loss if name == "val_loss" else self.metrics.get(name, {})

    def judge(self, name: str, best_step: int | None, *, higher_is_better: bool) -> str | None:
        """Set ``verdict`` by comparing one figure of the validated steps with step 0.

        It stays None if the step of the result, ``best_step``, is better, or was not measured.
        """
        values = self.figure(name)
        if best_step is None or best_step not in values or 0 not in values:
            return None
        sign = 1 if higher_is_better else -1
        start, best, last = values[0], values[best_step], values[max(values)]
        title = "validation loss" if name == "val_loss" else name
        if sign * best <= sign * start:
            self.verdict = (
                f"no validated step is better than the {self.before}: {title} {best:.4f} at step "
                f"{best_step}, {start:.4f} before training"
            )
        elif sign * last < sign * start:
            self.verdict = (
                f"the run ended worse than the {self.before}: {title} {last:.4f} at step "
                f"{max(values)}, {start:.4f} before training; the result is of step {best_step}: "
                f"{best:.4f}"
            )
        return self.verdict

    def write(self, directory: Path) -> None:
        """Write ``summary.json``, ``summary.md`` and ``loss.png`` into a directory."""
        (directory / SUMMARY_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")
        (directory / TABLE_FILE).write_text(self.table())
        self._plot(directory / PLOT_FILE)

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
        if self.held_out_loss:
            steps, losses = list(self.held_out_loss), list(self.held_out_loss.values())
            axes.plot(steps, losses, "o-", label=f"validation (step 0: {self.before})")
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a token")
        axes.legend()
        figure.savefig(path, dpi=120)
