"""From a run, its method, task and data to a :class:`~qst_tune.training.trainer.Trainer`."""

import io
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from omegaconf import OmegaConf
from torchtune import config, utils

from qst_tune.config.cli import instantiate
from qst_tune.config.keys import setting
from qst_tune.data.schedule import schedule_of
from qst_tune.data.training_data import TrainingData
from qst_tune.errors import UserError
from qst_tune.training.checkpointing import build_checkpointing
from qst_tune.training.method import Method, Task
from qst_tune.training.parameter_groups import scale_rates
from qst_tune.training.run_log import RunLog
from qst_tune.training.run_summary import BEFORE
from qst_tune.training.saved_run import (
    SavedRun,
    check_same_data,
    check_same_start,
    describe_data,
)
from qst_tune.training.trainer import Trainer
from qst_tune.training.training_run import Run

NO_PROFILER = {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False}

log = utils.get_logger("INFO")


def build_trainer(run: Run, method: Method, task: Task, data: TrainingData) -> Trainer:
    """Build what is left, optimizer, schedules and loggers, and restore the saved run.

    UserError if a component cannot be built, or the saved run was another one.
    """
    cfg, saved = run.cfg, run.saved
    description = describe_data(data.train, data.validation, data.digests)
    if saved is not None:
        check_same_data(saved, description)
        check_same_start(saved, run.start)
        method.load(saved.checkpoint.directory / method.result_name)
    schedule = schedule_of(cfg, data.train)
    optimizer = instantiate(cfg.optimizer, "optimizer", method.parameter_groups())
    scale_rates(optimizer)
    lr_scheduler = None
    if cfg.get("lr_scheduler"):
        settings = {"num_training_steps": schedule.num_steps, "last_epoch": -1}
        lr_scheduler = instantiate(cfg.lr_scheduler, "lr_scheduler", optimizer, **settings)
    start = run.start and run.start.digest
    about_run = {"data": description, "date": run.date, "start": start}
    profiler, _ = config.instantiate(cfg.get("profiler") or OmegaConf.create(NO_PROFILER))
    trainer = Trainer(
        method=method,
        task=task,
        train_data=data.train,
        validation_data=data.validation,
        schedule=schedule,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        clip_grad_norm=setting(cfg, "clip_grad_norm"),
        seed=run.seed,
        device=run.device,
        checkpointing=build_checkpointing(cfg, schedule, about_run, saved),
        run_log=_run_log(run),
        profiler=profiler,
    )
    if saved is not None:
        _restore(trainer, saved)
    return trainer


def _restore(trainer: Trainer, saved: SavedRun) -> None:
    try:
        trainer.restore(saved.state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"cannot resume from {saved.checkpoint.directory}: its state does not fit this run "
            f"({reason})"
        ) from error
    best = trainer.progress.best_step
    damage = None if best is None else trainer.checkpointing.store.damage(best)
    if damage:
        log.info(f"the checkpoint of step {best}, the best so far, is lost: {damage}")
        trainer.progress.forget_best()


def _run_log(run: Run) -> RunLog:
    cfg, metric_logger = run.cfg, None
    if run.is_main:
        is_disk = str(cfg.metric_logger.get("_component_")).endswith(".DiskLogger")
        # It prints "Writing logs to", which the config names.
        with redirect_stdout(io.StringIO()) if is_disk else nullcontext():
            metric_logger = instantiate(cfg.metric_logger, "metric_logger")
        metric_logger.log_config(cfg)
    return RunLog(
        metric_logger,
        directory=Path(cfg.output_dir),
        device=run.device,
        every=setting(cfg, "log_every_n_steps"),
        memory=setting(cfg, "log_peak_memory_stats"),
        before="start" if run.start else BEFORE,
    )
