"""The training loop that all methods and tasks share."""

import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from qst_tune.data.batches.checked_rows import row_numbers
from qst_tune.data.batches.loader import Batch, BatchLoader
from qst_tune.data.batches.schedule import Schedule
from qst_tune.data.batches.survey import NO_LABEL
from qst_tune.distributed.processes import gather_lists, sum_gradients, sum_or_fail
from qst_tune.errors import UserError
from qst_tune.modules.memory import count_saved_activations, memory_kind, memory_parts
from qst_tune.modules.model_limits import overflow_hint
from qst_tune.training.checkpoints import Checkpointing
from qst_tune.training.methods import Method
from qst_tune.training.progress import Progress, seed_step
from qst_tune.training.run_log import RunLog
from qst_tune.training.state_file import State
from qst_tune.training.stop_signals import StopSignals
from qst_tune.training.task import Task, on_device, parts_of


@dataclass(kw_only=True)
class Trainer:
    """One training run: :meth:`fit` does all of it.

    ``lr_scheduler`` steps after each optimizer step, ``clip_grad_norm`` is the largest norm of all
    gradients together, ``seed`` is of the random numbers of each step, and ``profiler`` one of
    torchtune's.
    """

    method: Method
    task: Task
    train_data: BatchLoader
    validation_data: BatchLoader | None
    schedule: Schedule
    optimizer: Optimizer
    lr_scheduler: LRScheduler | None
    clip_grad_norm: float | None
    seed: int
    device: torch.device
    checkpointing: Checkpointing
    run_log: RunLog
    profiler: Any

    progress: Progress = field(default_factory=Progress, init=False)
    stop: StopSignals = field(default_factory=StopSignals, init=False)
    is_stopping: bool = field(default=False, init=False)
    activation_bytes: int = field(default=0, init=False)

    def fit(self) -> None:
        """Run what is left of the run; validate and save on the way, and export the result.

        Raises:
            UserError: for a row that cannot be used, a loss that is not finite or a full disk; all
                complete steps are saved, as far as the disk allows.
            SystemExit: with status 128 + n, after a signal n and after saving.
        """
        start = time.perf_counter()
        bar = self.run_log.progress(self.schedule.num_steps, self.progress.step)
        with closing(self.run_log):
            with self.stop, self.profiler as profiler, bar:
                self.method.model.train()
                if self._is_validation_due():  # before the first step, or again after it failed
                    self._validate()
                while not self._is_finished():
                    self._run_epoch(profiler)
                self._save()
                self._report_end()
                self._export()
            self._summarise(time.perf_counter() - start)
        self.stop.exit_if_requested()

    def _is_finished(self) -> bool:
        patience = self.schedule.patience
        is_stale = patience is not None and self.progress.validations_since_best >= patience
        return self.progress.step >= self.schedule.num_steps or is_stale or self.is_stopping

    def _run_epoch(self, profiler: Any) -> None:
        """Run what is left of the current epoch."""
        epoch, done = divmod(self.progress.step, self.schedule.steps_per_epoch)
        batches = self.train_data.batches(epoch, start=done * self.schedule.accumulation)
        for _ in range(done, self.schedule.steps_per_epoch):
            self._train_step(batches)
            profiler.step()
            is_best = self._is_validation_due() and self._validate()
            if is_best or self.checkpointing.is_due(self.progress.step):
                self._save()
            if self._is_finished():
                break

    def _train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step over ``accumulation`` batches."""
        start = time.perf_counter()
        seed_step(self.seed, self.progress.step)
        num_tokens, (loss_sum, num_labels, num_stopped) = self._accumulate(batches)
        sum_gradients(self.trained)
        # Every label weighs the same, however labels are spread over batches and devices.
        gradients = [p.grad for p in self.trained if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / num_labels.clamp(min=1))
        norm = nn.utils.get_total_norm(gradients)
        mean_loss = loss_sum / num_labels.clamp(min=1)
        # The only time in a step that Python waits for the device.
        figures = torch.stack([mean_loss, norm, num_labels, num_stopped]).tolist()
        metrics = {"loss": figures[0], "lr": float(self.optimizer.param_groups[0]["lr"])}
        metrics["grad_norm"] = figures[1]
        if figures[3]:  # all processes leave after the same step, whichever got the signal
            self.is_stopping = True
            self.stop.request()
        if not figures[2]:
            self._report_empty_step()
            metrics["loss"] = math.nan  # no loss was measured; 0 would read as a perfect one
        elif math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            if self.clip_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(self.trained, self.clip_grad_norm, norm)
            self.optimizer.step()
        else:
            self._skip_or_stop(metrics)
        self.optimizer.zero_grad(set_to_none=True)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.progress.step += 1
        self._log_step(metrics, num_tokens, time.perf_counter() - start)

    def _accumulate(self, batches: Iterator[Batch]) -> tuple[int, torch.Tensor]:
        """Add up the gradients of a step's batches; returns the number of tokens, and sums.

        Those are of the losses, the labels and the processes that were told to stop.
        """
        total = torch.zeros(3, device=self.device)
        num_tokens, error = 0, None
        for _ in range(self.schedule.accumulation):
            try:
                if error is None:
                    batch = next(batches)
                    num_tokens += batch["tokens"].numel()
                    total[:2] += self._forward_backward(batch)
            except UserError as caught:  # a row that cannot be used
                error = caught
            if error is not None:
                self.task.take_part(self.method.model)
        total[2] = self.stop.requested
        try:
            return num_tokens, sum_or_fail(total, error)
        except (UserError, SystemExit):
            self._save_before_failing()
            raise

    def _forward_backward(self, batch: Batch) -> torch.Tensor:
        """Add one batch's gradients; returns the sum of its losses and its number of labels."""
        batch = on_device(batch, self.device)
        model, total = self.method.model, torch.zeros(2, device=self.device)
        for part in parts_of(self.task, model, batch):
            counting = nullcontext() if self.activation_bytes else count_saved_activations(model)
            with counting as saved:
                loss_sum, num_labels = self.task.loss(model, part)
            if saved is not None:
                self.activation_bytes = saved.num_bytes
            loss_sum.backward()
            total += torch.stack([loss_sum.detach(), num_labels.to(loss_sum.dtype)])
            del loss_sum  # its graph's nodes belong to this stream; a capture must not meet them
        return total

    def _log_step(self, metrics: dict[str, float], num_tokens: int, seconds: float) -> None:
        self.progress.num_tokens += num_tokens
        self.progress.step_seconds += seconds
        metrics["tokens_per_second_per_gpu"] = num_tokens / seconds
        if self.run_log.is_due(self.progress.step):
            metrics |= self.method.statistics()
        self.run_log.step(self.progress.step, metrics)

    # Steps that cannot be used.

    def _skip_or_stop(self, metrics: dict[str, float]) -> None:
        """Skip a step whose loss or gradient is not finite, or stop the run there."""
        progress, allowed = self.progress, self.schedule.max_bad_steps
        what = (
            f"step {progress.step + 1}: the loss is {metrics['loss']} and the gradient's norm "
            f"{metrics['grad_norm']} (rows {self._rows_of_step()} of the dataset)"
        )
        if progress.skipped_steps < allowed:
            progress.skipped_steps += 1
            self.run_log.report(f"{what}: skipped, {progress.skipped_steps} of at most {allowed}")
            return
        self._save_before_failing()
        raise UserError(
            f"{what}: stopped before it; lower optimizer.lr, set clip_grad_norm, mend those rows, "
            "or set skip_bad_steps=<how many> to skip such steps"
            f"{overflow_hint(self.method.model)}"
        )

    def _report_empty_step(self) -> None:
        """Count a step without a label, which changes nothing; name the rows of the first one."""
        self.progress.empty_steps += 1
        if self.progress.empty_steps == 1:
            self.run_log.report(
                f"warning: step {self.progress.step + 1} learns nothing, since none of its rows "
                f"({self._rows_of_step()} of the dataset) has a label: {NO_LABEL}"
            )

    def _rows_of_step(self) -> str:
        """Numbers of the rows of the current step, of all processes. Collective."""
        epoch, index = divmod(self.progress.step, self.schedule.steps_per_epoch)
        first = index * self.schedule.accumulation
        batches = self.train_data.rows(epoch)[first : first + self.schedule.accumulation]
        dataset = self.train_data.dataset
        rows = gather_lists([row for batch in batches for row in row_numbers(dataset, batch)])
        return ", ".join(map(str, rows))

    # Validation.

    def _is_validation_due(self) -> bool:
        every, step = self.schedule.validate_every, self.progress.step
        is_step = step % self.schedule.steps_per_epoch == 0 or bool(every and step % every == 0)
        return is_step and step != self.progress.validated_step

    def _validate(self) -> bool:
        """Measure on the validation set; returns whether this is the best step so far."""
        if self.validation_data is None:
            return False
        try:
            figures = self.task.evaluate(self.method.model, self.validation_data)
        except (UserError, SystemExit):  # a row that cannot be used
            self._save_before_failing()
            raise
        self.run_log.evaluation(self.progress.step, figures)
        self.progress.validated_step = self.progress.step
        value = figures[self.task.monitor]
        if not math.isfinite(value):
            hint = overflow_hint(self.method.model)
            self.run_log.report(f"warning: {self.task.monitor} is {value}, never the best{hint}")
        if self.progress.step == 0:
            return False
        return self.progress.record(value, higher_is_better=self.task.higher_is_better)

    def _validated(self) -> dict[int, float]:
        """The monitored figure of each step that was validated, without that before training."""
        values = self.run_log.summary.figure(self.task.monitor)
        return {step: value for step, value in values.items() if step > 0}

    # What is saved, and taken back.

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def state(self) -> State:
        """Return what a resumed run needs besides the method's own files."""
        return {
            "seed": self.seed,
            "progress": asdict(self.progress),
            "history": self.run_log.summary.history(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict() if self.lr_scheduler else None,
        }

    def restore(self, state: State) -> None:
        """Take :meth:`state` of the same run back; the method has loaded its own files already."""
        self.progress = Progress.from_dict(state["progress"])
        self.run_log.summary.restore(state["history"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])

    def _save(self) -> None:
        results = self.run_log.summary.results()
        self.checkpointing.save(self.method, results, self.state(), self.progress)

    def _save_before_failing(self) -> None:
        """Keep the complete steps, unless that fails too: the reason for stopping matters more."""
        try:
            if all(parameter.isfinite().all() for parameter in self.trained):
                self._save()
        except UserError as error:
            self.run_log.report(str(error))

    def replace_damaged_best(self) -> None:
        """Choose another best step if the checkpoint of the best one is damaged. Collective."""
        better, notes = self.task.higher_is_better, []
        if self.run_log.is_main:
            notes = self.checkpointing.replace_damaged_best(
                self.progress, self._validated(), higher_is_better=better
            )
        for note in notes:
            self.run_log.report(note)
        (self.progress,) = gather_lists([self.progress] if self.run_log.is_main else [])

    # The end.

    def _report_end(self) -> None:
        """Report why the run stopped, and what must not be mistaken for a success."""
        done = f"after step {self.progress.step} of {self.schedule.num_steps}"
        if self.is_stopping:
            self.run_log.report(
                f"stopped by {self.stop.name} {done}; resume with resume_from_checkpoint=True"
            )
        elif self.progress.step < self.schedule.num_steps:
            count = self.progress.validations_since_best
            self.run_log.report(f"stopped {done}: no better for {count} validations")
        empty = self.progress.empty_steps
        if empty and empty == self.progress.step:
            raise UserError(f"dataset: no step had a label, so nothing was learnt: {NO_LABEL}")
        if empty:
            self.run_log.report(
                f"warning: {empty} of {self.progress.step} steps had no label and changed "
                f"nothing: {NO_LABEL}"
            )

    def _export(self) -> None:
        """Judge the run, and write the best result, the last one if none was measured."""
        self.replace_damaged_best()
        best, values = self.progress.best_step, self._validated()
        sign = 1 if self.task.higher_is_better else -1
        self.run_log.judge(self.task, best)
        if best is None:
            which = "the last step"
        elif any(sign * value > sign * values[best] for value in values.values()):
            which = "the best step whose checkpoint is not damaged"
        elif self.run_log.summary.verdict:
            which = "the best of the validated steps"
        else:
            which = "the best on the validation set"
        if self.run_log.is_main and self.progress.step:
            self.checkpointing.export(self.method, self.progress, self.run_log, which=which)

    def _summarise(self, seconds: float) -> None:
        summary, progress = self.run_log.summary, self.progress
        summary.trainable_parameters = sum(p.numel() for p in self.trained)
        summary.memory_gib = memory_parts(
            self.method.model, self.optimizer, self.activation_bytes, self.device
        )
        summary.memory_kind = memory_kind(self.device)
        summary.tokens_per_second = progress.num_tokens / max(progress.step_seconds, 1e-9)
        summary.seconds = seconds
        summary.best_step = progress.best_step
        summary.skipped_steps = progress.skipped_steps
        summary.empty_steps = progress.empty_steps
        self.run_log.finish()
