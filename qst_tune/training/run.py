"""Set up a training run: model files, device, seed, checkpoint, trainer; cheap failures first."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from torchtune import utils

from qst_tune import __version__
from qst_tune.backbone.torchtune_loading import check_architecture
from qst_tune.config.components import instantiate
from qst_tune.config.device import choose_device, choose_dtype
from qst_tune.config.model_directory import changed_texts, fetch_models
from qst_tune.config.record import recorded, secret_keys
from qst_tune.config.schedule_check import build_lr_scheduler, report_schedule
from qst_tune.config.schema import TrainingConfig
from qst_tune.data.batches.schedule import Schedule, schedule_of
from qst_tune.data.batches.survey_report import report_data
from qst_tune.data.batches.training_data import TrainingData
from qst_tune.distributed.processes import is_main_process, process_group
from qst_tune.errors import UserError
from qst_tune.file_lock import only_process
from qst_tune.quantization.kernels import allow_triton
from qst_tune.results.output_directory import output_directory
from qst_tune.results.start import Start, find_start
from qst_tune.training.checkpoints import (
    CHECKPOINTS_DIRECTORY,
    FORMAT_VERSION,
    Checkpointing,
    CheckpointStore,
)
from qst_tune.training.methods import Method, scale_rates
from qst_tune.training.resume import (
    SavedRun,
    check_same_data,
    check_same_start,
    describe_data,
    find_saved_run,
    set_run_date,
    set_run_seed,
)
from qst_tune.training.run_log import BEFORE, RunLog
from qst_tune.training.state_file import State
from qst_tune.training.task import Task
from qst_tune.training.trainer import Trainer

TORCHTUNE_CONFIG = "torchtune_config.yaml"  # of torchtune's metric loggers
NO_PROFILER = {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False}

log = utils.get_logger("INFO")


@dataclass(frozen=True)
class Run:
    """A run that has begun."""

    cfg: TrainingConfig  # hub names are replaced by directories of this machine
    device: torch.device  # of this process
    dtype: torch.dtype  # of what is neither quantized nor trainable
    seed: int  # of all random numbers
    tokenizer: Any  # torchtune model tokenizer
    date: str | None  # the run's first day, ISO, for chat templates that print one
    saved: SavedRun | None  # the checkpoint that is resumed
    start: Start | None  # the result that the run starts from
    trials: tuple["Run", ...] = ()  # runs that share its backbone and batches
    title: str = ""  # begins each line that a trial prints

    @property
    def data_seed(self) -> int:
        """Seed of the order of the samples: the config's ``data_seed``, else ``seed``."""
        return self.seed if self.cfg.data_seed is None else self.cfg.data_seed

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints."""
        return is_main_process()

    def report(self, model: Any, data: TrainingData) -> None:
        """Print data and schedule; for a dry run, compare the model with its stored config too."""
        report_data(data, self.tokenizer)
        report_schedule(self.cfg, schedule_of(self.cfg, data.train).num_steps)
        if self.cfg.dry_run:
            check_architecture(model, Path(self.cfg.checkpointer.checkpoint_dir))


@contextmanager
def begin_run(cfg: TrainingConfig, trials: Sequence[TrainingConfig] = ()) -> Iterator[Run]:
    """Fetch the model of a config and choose device, seed and what is resumed.

    ``trials`` are runs that share it; each is resumed by itself. UserError for a wrong checkpoint
    or directory.
    """
    fetched: Literal["tokenizer", "weights"] = "tokenizer" if cfg.dry_run else "weights"
    cfg, *trials = (fetch_models(one, fetched) for one in (cfg, *trials))
    with run_environment(cfg) as (device, dtype), ExitStack() as stack:
        for trial in trials:
            _enter_directory(stack, trial)
        saved = None if trials else find_saved_run(cfg)
        saved_trials = [_saved_trial(*numbered) for numbered in enumerate(trials, start=1)]
        seed = set_run_seed(cfg, saved)
        tokenizer = instantiate(cfg.tokenizer, "tokenizer")
        date = set_run_date(tokenizer, next(filter(None, [saved, *saved_trials]), None))
        run = Run(cfg, device, dtype, seed, tokenizer, date, saved, find_start(cfg))
        pairs = enumerate(zip(trials, saved_trials, strict=True), start=1)
        yield replace(run, trials=tuple(_trial(run, number, *pair) for number, pair in pairs))


def _saved_trial(number: int, cfg: TrainingConfig) -> SavedRun | None:
    try:
        return find_saved_run(cfg)
    except UserError as error:
        raise UserError(
            "\n".join(f"trial {number}: {e}" for e in str(error).splitlines())
        ) from error


def _trial(run: Run, number: int, cfg: TrainingConfig, saved: SavedRun | None) -> Run:
    """A run that shares another's device, tokenizer and batches, with a seed of its own."""
    assert cfg.seed is not None, "read_trials refuses it"
    title = f"trial {number}: "
    return replace(run, cfg=cfg, seed=cfg.seed, saved=saved, start=find_start(cfg), title=title)


def _enter_directory(stack: ExitStack, cfg: TrainingConfig) -> None:
    """Make and hold the output directory, unless nothing is to be written."""
    if not cfg.dry_run:
        stack.enter_context(output_directory(cfg.output_dir))
        if os.environ.get("RANK", "0") == "0":
            stack.enter_context(only_process(cfg.output_dir, name="output_dir"))


@contextmanager
def run_environment(cfg: TrainingConfig) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Choose device and dtype, and hold the output directory and the process group for a run.

    With ``dry_run`` nothing is written, not even the directory. UserError if the device, the dtype
    or the directory cannot be used, or another run uses the directory.
    """
    device = choose_device(cfg.device)
    dtype = choose_dtype(cfg.dtype, device)
    allow_triton(cfg.triton_kernels)
    with ExitStack() as stack:
        _enter_directory(stack, cfg)
        stack.enter_context(process_group(device))
        yield device, dtype


def build_trainer(run: Run, method: Method, task: Task, data: TrainingData) -> Trainer:
    """Build what is left, optimizer, schedules and loggers, and restore the saved run.

    UserError if a component cannot be built, or the saved run was another one.
    """
    cfg, saved = run.cfg, run.saved
    description = describe_data(data.train, data.validation, data.digests)
    if saved is not None:
        check_same_data(saved, description)
        check_same_start(saved, run.start)
        method.load(saved.directory / method.result_name)
    schedule = schedule_of(cfg, data.train)
    optimizer = instantiate(cfg.optimizer, "optimizer", method.parameter_groups())
    scale_rates(optimizer)
    lr_scheduler = build_lr_scheduler(cfg, optimizer, schedule.num_steps)
    profiler = _profiler(cfg)
    trainer = Trainer(
        method=method,
        task=task,
        train_data=data.train,
        validation_data=data.validation,
        schedule=schedule,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        clip_grad_norm=cfg.clip_grad_norm,
        seed=run.seed,
        device=run.device,
        checkpointing=_checkpointing(run, schedule, description),
        run_log=_run_log(run),
        profiler=profiler,
    )
    if saved is not None:
        with saved.read() as state:
            trainer.restore(state)
        trainer.replace_damaged_best()
    return trainer


def _checkpointing(run: Run, schedule: Schedule, data: State) -> Checkpointing:
    """Build the checkpointing in ``output_dir``; no checkpoint of another run stays in its way."""
    cfg = run.cfg
    store = CheckpointStore(cfg.output_dir / CHECKPOINTS_DIRECTORY)
    if run.is_main and run.saved is not None:
        for step in store.steps():
            if step > run.saved.step:  # damaged, or the run would resume from it
                store.set_aside(step)
    elif run.is_main and (renamed := store.set_all_aside()) is not None:
        log.info(
            f"{store.directory} of an earlier run is now {renamed.name}; "
            "resume_from_checkpoint=True would have resumed it"
        )
    return Checkpointing(
        store=store,
        header={
            "format_version": FORMAT_VERSION,
            "versions": {"qst_tune": __version__, "torch": torch.__version__},
            "config": recorded(cfg.raw),
            "data": data,
            "date": run.date,
            "start": run.start and run.start.digest,
        },
        steps_per_epoch=schedule.steps_per_epoch,
        every=cfg.save_every_n_steps,
        keep=cfg.keep_last_n_checkpoints,
    )


def _profiler(cfg: TrainingConfig) -> Any:
    """Build the profiler, a context manager with ``step``; UserError if it is something else."""
    built = instantiate(cfg.profiler or OmegaConf.create(NO_PROFILER), "profiler")
    profiler = built[0] if isinstance(built, tuple) and built else built
    if not (hasattr(profiler, "step") and hasattr(profiler, "__enter__")):
        name = cfg.profiler and cfg.profiler._component_
        raise UserError(
            f"profiler: {name} builds no profiler: use torchtune.training.setup_torch_profiler"
        )
    return profiler


def _log_config(metric_logger: Any, cfg: TrainingConfig) -> None:
    """Log the config without secrets; torchtune's loggers also write it into ``output_dir``."""
    config = {**recorded(cfg.raw), "output_dir": str(cfg.output_dir)}
    # Some send it resolved to a service: what is of the environment must not look like a reference.
    shown = changed_texts(config, lambda text: text.replace("${", r"\${"))
    metric_logger.log_config(OmegaConf.create(shown))
    file = cfg.output_dir / TORCHTUNE_CONFIG
    if file.is_file():
        file.chmod(0o600)
        file.write_text(OmegaConf.to_yaml(OmegaConf.create(config)), encoding="utf-8")
    for key in secret_keys(cfg.raw):
        log.info(f"{key} is not written into {cfg.output_dir}: name it again where it is needed")


def _run_log(run: Run) -> RunLog:
    cfg, metric_logger = run.cfg, None
    if run.is_main:
        is_disk = str(cfg.metric_logger.get("_component_")).endswith(".DiskLogger")
        # It prints "Writing logs to", which the config names.
        with redirect_stdout(io.StringIO()) if is_disk else nullcontext():
            metric_logger = instantiate(cfg.metric_logger, "metric_logger")
        if not all(hasattr(metric_logger, name) for name in ("log_dict", "log_config", "close")):
            raise UserError(
                f"metric_logger: {cfg.metric_logger._component_} is no logger: use one of "
                "torchtune.training.metric_logging"
            )
        _log_config(metric_logger, cfg)
    return RunLog(
        metric_logger,
        directory=cfg.output_dir,
        device=run.device,
        every=cfg.log_every_n_steps,
        memory=cfg.log_peak_memory_stats,
        before="start" if run.start else BEFORE,
        title=run.title,
    )
