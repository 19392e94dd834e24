"""The log of a run: a progress bar, a metric logger, and a summary at the end."""

import math
from pathlib import Path
from typing import Any

import torch
from torchtune import utils
from tqdm import tqdm

from qst_tune.distributed.processes import rank_and_world_size
from qst_tune.modules.memory import GIB, memory_kind, peak_memory_bytes
from qst_tune.training.method import Task
from qst_tune.training.run_summary import BEFORE, RunSummary

log = utils.get_logger("INFO")


class RunLog:
    """Prints and logs on the main process, keeps the summary on every process.

    Args:
        metric_logger (Any): one of torchtune's; None on all processes except the main one.
        directory (Path): of the run.
        device (torch.device): whose memory is shown.
        every (int): steps between two entries of the metric logger.
        memory (bool): log peak memory too.
        before (str): what validation at step 0 measures, for people.
    """

    def __init__(
        self,
        metric_logger: Any,
        *,
        directory: Path,
        device: torch.device,
        every: int = 1,
        memory: bool = False,
        before: str = BEFORE,
    ) -> None:
        self.metric_logger = metric_logger
        self.directory = directory
        self.device = device
        self.every = every
        self.memory = memory
        # Short, for the progress bar.
        self.memory_name = "peak_cuda" if device.type == "cuda" else "peak_rss"
        self.summary = RunSummary(before=before)
        self.is_main = rank_and_world_size()[0] == 0

    def progress(self, num_steps: int, done: int) -> Any:
        """Return a progress bar, a context manager, silent on all processes except the main one."""
        self.bar = tqdm(total=num_steps, initial=done, desc="training", disable=not self.is_main)
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
            extra = {"peak_memory_gib": memory} if self.memory else {}
            self._log({**metrics, **extra}, step)

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Record figures of validation by name; step 0 is before training."""
        for name, value in figures.items():
            if not math.isfinite(value):  # JSON has no NaN
                continue
            if name == "val_loss":
                self.summary.held_out_loss[step] = value
            else:
                self.summary.metrics.setdefault(name, {})[step] = value
        where = self.summary.before if step == 0 else f"step {step}"
        texts = {"val_loss": "validation loss"}
        for name, value in figures.items():
            self.report(f"{texts.get(name, name)}, {where}: {value:.4f}")
        self._log(figures, step)

    def judge(self, task: Task, best_step: int | None) -> None:
        """Warn of a run that made the model no better, here and in the summary."""
        better = task.higher_is_better
        verdict = self.summary.judge(task.monitor, best_step, higher_is_better=better)
        if verdict:
            self.report(f"warning: {verdict}")

    def report(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.is_main:
            tqdm.write(text)

    def finish(self) -> None:
        """Write the summary."""
        if self.is_main:
            self.summary.write(self.directory)
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
