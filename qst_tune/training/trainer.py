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

from qst_tune.data.batches.loader import Batch, BatchLoader
from qst_tune.data.batches.read_once import ReadOnce
from qst_tune.data.batches.schedule import Schedule
from qst_tune.distributed.processes import gather_lists, sum_gradients, sum_or_fail
from qst_tune.errors import UserError
from qst_tune.modules.memory import count_saved_activations, memory_kind, memory_parts
from qst_tune.modules.model_limits import overflow_hint
from qst_tune.training.bad_steps import (
    bad_step_error,
    describe_bad_step,
    empty_step_warning,
    empty_steps_warning,
    rows_of_step,
)
from qst_tune.training.checkpoints import Checkpointing
from qst_tune.training.methods import Method
from qst_tune.training.progress import Progress, seed_step
from qst_tune.training.run_log import RunLog
from qst_tune.training.state_file import State
from qst_tune.training.stop_signals import StopSignals
from qst_tune.training.task import GivenUp, Passes, Task, Turns, in_turns, on_device, parts_of


@dataclass(kw_only=True)
class Trainer:
    """One training run: :meth:`fit` does all of it, :meth:`turns` a batch at a time.

    ``lr_scheduler`` steps after each optimizer step, ``clip_grad_norm`` is the largest norm of all
    gradients together, ``seed`` is of the random numbers of each step, and ``profiler`` one of
    torchtune's.
    """

    method: Method
    task: Task
    train_data: BatchLoader | ReadOnce
    validation_data: BatchLoader | ReadOnce | None
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
    seconds_waited: float = field(default=0.0, init=False)  # for the turns of other runs

    def fit(self) -> None:
        """Run what is left of the run; validate and save on the way, and export the result.

        Raises:
            UserError: for a row that cannot be used, a loss that is not finite or a full disk; all
                complete steps are saved, as far as the disk allows.
            SystemExit: with status 128 + n, after a signal n and after saving.
        """
        with self.stop:
            for _ in self.turns():
                pass
        self.stop.exit_if_requested()

    def turns(self) -> Turns[None]:
        """Do what :meth:`fit` does, and yield where the run is before each pass of the model.

        Other runs over the same frozen backbone may take their turns in between; whoever lets them
        restores the random numbers and adds to ``seconds_waited``; GivenUp ends the run.
        """
        start = time.perf_counter()
        bar = self.run_log.progress(self.schedule.num_steps, self.progress.step)
        with closing(self.run_log):
            with self.profiler as profiler, bar:
                self.method.model.train()
                try:
                    if self._is_validation_due():  # before the first step, or it had failed
                        yield from self._validate()
                    while not self._is_finished():
                        yield from self._run_epoch(profiler)
                except GivenUp as reason:
                    self.run_log.report(f"given up after step {self.progress.step}: {reason}")
                self._save()
                self._report_end()
                self._export()
            self._summarise(time.perf_counter() - start - self.seconds_waited)

    def _is_finished(self) -> bool:
        is_stale = self.schedule.is_stale(self.progress.validations_since_best)
        return self.progress.step >= self.schedule.num_steps or is_stale or self.is_stopping

    def _run_epoch(self, profiler: Any) -> Turns[None]:
        """Run what is left of the current epoch."""
        epoch, done = divmod(self.progress.step, self.schedule.steps_per_epoch)
        batches = self.train_data.batches(epoch, start=done * self.schedule.accumulation)
        for _ in range(done, self.schedule.steps_per_epoch):
            yield from self._train_step(batches)
            profiler.step()
            is_best = self._is_validation_due() and (yield from self._validate())
            if is_best or self.checkpointing.is_due(self.progress.step):
                self._save()
            if self._is_finished():
                break

    def _train_step(self, batches: Iterator[Batch]) -> Turns[None]:
        """One optimizer step over ``accumulation`` batches."""
        start, waited = time.perf_counter(), self.seconds_waited
        seed_step(self.seed, self.progress.step)
        passes = self._accumulate(batches)
        num_tokens, sums = yield from in_turns(passes, self.progress.step, 1)
        loss_sum, num_labels, num_stopped = sums
        sum_gradients(self.trained)
        # Every label weighs the same, however labels are spread over batches and devices.
        gradients = [p.grad for p in self.trained if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / num_labels.clamp(min=1))
        norm = nn.utils.get_total_norm(gradients)
        mean_loss = loss_sum / num_labels.clamp(min=1)
        # The only time in a step that Python waits for the device.
        figures = torch.stack([mean_loss, norm, num_labels, num_stopped]).tolist()
        loss, grad_norm, has_labels, has_stopped = figures
        rate = float(self.optimizer.param_groups[0]["lr"])
        metrics = {"loss": loss, "lr": rate, "grad_norm": grad_norm}
        if has_stopped:  # all processes leave after the same step, whichever got the signal
            self.is_stopping = True
            self.stop.request()
        if not has_labels:
            self._report_empty_step()
            metrics["loss"] = math.nan  # no loss was measured; 0 would read as a perfect one
        elif math.isfinite(loss) and math.isfinite(grad_norm):
            if self.clip_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(self.trained, self.clip_grad_norm, norm)
            self.optimizer.step()
        else:
            self._skip_or_stop(metrics)
        self.optimizer.zero_grad(set_to_none=True)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.progress.step += 1
        seconds = time.perf_counter() - start - (self.seconds_waited - waited)
        self._log_step(metrics, num_tokens, seconds)

    def _accumulate(self, batches: Iterator[Batch]) -> Passes[tuple[int, torch.Tensor]]:
        """Add up the gradients of a step's batches; returns the number of tokens, and sums.

        Those are of the losses, the labels and the processes that were told to stop.
        """
        total = torch.zeros(3, device=self.device)
        num_tokens, error = 0, None
        for _ in range(self.schedule.accumulation):
            yield
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
            # Its nodes of autograd belong to this stream. A recording has leaves of its own since
            # they spoilt some, but that has not run on a GPU yet.
            del loss_sum
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
        what = describe_bad_step(progress.step + 1, metrics, self._rows_of_step())
        if progress.skipped_steps < allowed:
            progress.skipped_steps += 1
            self.run_log.report(f"{what}: skipped, {progress.skipped_steps} of at most {allowed}")
            return
        self._save_before_failing()
        raise bad_step_error(what, overflow_hint(self.method.model))

    def _report_empty_step(self) -> None:
        """Count a step without a label, which changes nothing; name the rows of the first one."""
        self.progress.empty_steps += 1
        if self.progress.empty_steps == 1:
            rows = self._rows_of_step()
            self.run_log.report(empty_step_warning(self.progress.step + 1, rows))

    def _rows_of_step(self) -> str:
        return rows_of_step(self.train_data, self.schedule, self.progress.step)

    # Validation.

    def _is_validation_due(self) -> bool:
        step = self.progress.step
        return self.schedule.validates_after(step) and step != self.progress.validated_step

    def _validate(self) -> Turns[bool]:
        """Measure on the validation set; returns whether this is the best step so far."""
        if self.validation_data is None:
            return False
        try:
            passes = self.task.evaluating(self.method.model, self.validation_data)
            figures = yield from in_turns(passes, self.progress.step, 0)
        except (UserError, SystemExit):  # a row that cannot be used
            self._save_before_failing()
            raise
        self.run_log.evaluation(self.progress.step, figures)
        self.progress.validated_step = self.progress.step
        monitor = self.task.monitor
        value = figures[monitor.name]
        if not math.isfinite(value):
            hint = overflow_hint(self.method.model)
            self.run_log.report(f"warning: {monitor.name} is {value}, never the best{hint}")
        if self.progress.step == 0:
            return False
        return self.progress.record(value, monitor)

    def validated(self) -> dict[int, float]:
        """The monitored figure of each step that was validated, without that before training."""
        values = self.run_log.summary.figure(self.task.monitor.name)
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
        if self.run_log.is_main:
            for note in self.checkpointing.replace_damaged_best(
                self.progress, self.validated(), self.task.monitor
            ):
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
        elif self._is_finished() and self.progress.step < self.schedule.num_steps:
            count = self.progress.validations_since_best
            self.run_log.report(f"stopped {done}: no better for {count} validations")
        warning = empty_steps_warning(self.progress.empty_steps, self.progress.step)
        if warning:
            self.run_log.report(warning)

    def _export(self) -> None:
        """Judge the run, and write the best result, the last one if none was measured."""
        self.replace_damaged_best()
        self.run_log.judge(self.task.monitor, self.progress.best_step)
        if self.run_log.is_main and self.progress.step:
            which = self.progress.describe_best(
                self.validated(),
                self.task.monitor,
                is_worse=self.run_log.summary.verdict is not None,
            )
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
