"""From a training config to a :class:`~qst_tune.training.trainer.Trainer`, for every recipe."""

import io
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Subset
from torchtune import config, utils
from torchtune.data import padded_collate_packed

from qst_tune.errors import UserError
from qst_tune.training.batches import BatchLoader, Collate
from qst_tune.training.checkpointing import build_checkpointing
from qst_tune.training.cli import instantiate
from qst_tune.training.data import DEFAULT_COLLATE, build_collate, build_dataset
from qst_tune.training.distributed import rank_and_world_size
from qst_tune.training.label_check import check_labels
from qst_tune.training.method import Method, Task
from qst_tune.training.packing import is_packed
from qst_tune.training.parameter_groups import scale_rates
from qst_tune.training.rows import hold_out
from qst_tune.training.run_log import RunLog
from qst_tune.training.run_summary import BEFORE
from qst_tune.training.saved_run import (
    SavedRun,
    check_same_data,
    check_same_start,
    describe_data,
)
from qst_tune.training.schedule import Schedule
from qst_tune.training.start import Start
from qst_tune.training.step_size import describe_step, fit_step
from qst_tune.training.survey import Survey
from qst_tune.training.trainer import Trainer
from qst_tune.training.vocabulary import Vocabulary

NO_PROFILER = {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False}

log = utils.get_logger("INFO")


@dataclass(frozen=True)
class TrainingData:
    """The batches of a run.

    Args:
        train (BatchLoader): training rows.
        held_out (BatchLoader | None): validation rows.
        seed (int): of the run.
        surveys (Sequence[Survey]): figures of the datasets of the training rows.
        held_out_surveys (Sequence[Survey]): of the validation rows, if they are datasets of
            their own.
        notes (Sequence[str]): what a user must know of them, one line each.
    """

    train: BatchLoader
    held_out: BatchLoader | None
    seed: int
    surveys: Sequence[Survey] = ()
    held_out_surveys: Sequence[Survey] = ()
    notes: Sequence[str] = ()

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the content of all rows, by the names of ``saved_run.describe_data``."""
        surveys = {
            "training rows": self.surveys,
            "held-out rows": self.held_out_surveys or self.surveys,
        }
        return {
            name: " ".join(survey.digest for survey in some)
            for name, some in surveys.items()
            if some
        }


def text_collate(cfg: DictConfig, vocabulary: Vocabulary, *, max_seq_len: int) -> Collate:
    """Build the collate function of rows of text, after checking that they can fit the model."""
    longest = getattr(vocabulary.tokenizer, "max_seq_len", None)
    if longest and longest > max_seq_len:
        raise UserError(
            f"tokenizer.max_seq_len={longest} is longer than the model's max_seq_len "
            f"{max_seq_len}: lower it"
        )
    return build_collate(
        vocabulary,
        max_seq_len=max_seq_len,
        component=cfg.get("collate_fn") or DEFAULT_COLLATE,
    )


def build_data(
    cfg: DictConfig,
    tokenizer: Any,
    collate: Collate,
    *,
    seed: int,
    max_seq_len: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> TrainingData:
    """Build the datasets, reading every row once, and decide which rows make which batch.

    ``collate`` makes a batch of unpacked rows. A row longer than ``max_seq_len``, or with ids
    outside ``vocabulary``, is a bad one. UserError if a dataset cannot be built or has nothing to
    learn.
    """
    settings: dict[str, Any] = {
        "max_seq_len": max_seq_len,
        "skip_bad_rows": cfg.get("on_bad_row") == "skip",
        "vocabulary": vocabulary,
    }
    surveys: list[Survey] = []
    held_out_surveys: list[Survey] = []
    rows = build_dataset(cfg.dataset, "dataset", tokenizer, surveys=surveys, **settings)
    train_collate = collate_of(rows, collate)
    held_out_rows, held_out_collate = None, train_collate
    if cfg.get("dataset_val"):
        held_out_rows = build_dataset(
            cfg.dataset_val, "dataset_val", tokenizer, surveys=held_out_surveys, **settings
        )
        held_out_collate = collate_of(held_out_rows, collate)
    elif cfg.get("val_fraction"):
        rows, held_out_rows = hold_out(rows, float(cfg.val_fraction), seed)
    notes = [
        *_label_warning("dataset", surveys, rows),
        *_label_warning("validation rows", held_out_surveys or surveys, held_out_rows),
        *filter(None, [describe_step(cfg, len(rows), noun=_noun(rows))]),
    ]
    num_workers = cfg.get("num_workers") or 0
    train = BatchLoader(
        rows,
        train_collate,
        batch_size=fit_step(cfg, len(rows))[0],
        seed=seed if cfg.get("shuffle", True) else None,
        num_workers=num_workers,
        same_batches=cfg.get("hidden_state_cache") is not None,
    )
    schedule_of(cfg, train)  # fails early, before the model loads
    held_out = held_out_rows and BatchLoader(
        held_out_rows,
        held_out_collate,
        batch_size=cfg.get("batch_size_val") or cfg.batch_size,
        seed=None,
        drop_last=False,
        num_workers=num_workers,
    )
    return TrainingData(train, held_out, seed, surveys, held_out_surveys, notes)


def build_trainer(
    cfg: DictConfig,
    method: Method,
    task: Task,
    data: TrainingData,
    device: torch.device,
    saved: SavedRun | None,
    *,
    date: str | None = None,
    start: Start | None = None,
) -> Trainer:
    """Build what is left, optimizer, schedules and loggers, and restore the saved run.

    UserError if a component cannot be built, or the saved run was another one.
    """
    description = describe_data(data.train, data.held_out, data.digests)
    if saved is not None:
        check_same_data(saved, description)
        check_same_start(saved, start)
        method.load(saved.checkpoint.folder / method.result_name)
    schedule = schedule_of(cfg, data.train)
    optimizer = instantiate(cfg.optimizer, "optimizer", method.parameter_groups())
    scale_rates(optimizer)
    lr_scheduler = None
    if cfg.get("lr_scheduler"):
        lr_scheduler = instantiate(
            cfg.lr_scheduler,
            "lr_scheduler",
            optimizer,
            num_training_steps=schedule.num_steps,
            last_epoch=-1,
        )
    clip = cfg.get("clip_grad_norm")
    about_run = {"data": description, "date": date, "start": start and start.digest}
    profiler, _ = config.instantiate(cfg.get("profiler") or OmegaConf.create(NO_PROFILER))
    trainer = Trainer(
        method=method,
        task=task,
        train_data=data.train,
        held_out_data=data.held_out,
        schedule=schedule,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        clip_grad_norm=None if clip is None else float(clip),
        seed=data.seed,
        device=device,
        checkpointing=build_checkpointing(cfg, schedule, about_run, saved),
        run_log=_run_log(cfg, device, "start" if start else BEFORE),
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
            f"cannot resume from {saved.checkpoint.folder}: its state does not fit this run "
            f"({reason})"
        ) from error
    best = trainer.progress.best_step
    damage = None if best is None else trainer.checkpointing.store.damage(best)
    if damage:
        log.info(f"the checkpoint of step {best}, the best so far, is lost: {damage}")
        trainer.progress.forget_best()


def schedule_of(cfg: DictConfig, train: BatchLoader) -> Schedule:
    """Return when what happens in a run; UserError if there are fewer rows than processes."""
    _, accumulation = fit_step(cfg, len(train.dataset))
    steps = len(train) // accumulation
    return Schedule(
        epochs=cfg.epochs,
        steps_per_epoch=min(steps, cfg.get("max_steps_per_epoch") or steps),
        accumulation=accumulation,
        validate_every=cfg.get("run_val_every_n_steps"),
        patience=cfg.get("early_stopping_patience"),
        max_bad_steps=cfg.get("skip_bad_steps") or 0,
    )


def _label_warning(name: str, surveys: Sequence[Survey], rows: Any) -> Iterator[str]:
    """A warning if some rows have nothing to learn; packs are judged by all of their rows."""
    if rows is None or not surveys:  # no such rows, or packs of the user's own code
        return
    part = rows.indices if isinstance(rows, Subset) and not is_packed(rows.dataset) else None
    yield from (f"warning: {warning}" for warning in check_labels(name, surveys, part))


def _noun(rows: Any) -> str:
    return "packs" if is_packed(rows.dataset if isinstance(rows, Subset) else rows) else "rows"


def collate_of(rows: Any, collate: Collate) -> Collate:
    """Choose the collate function of a dataset: torchtune's own for packs."""
    return padded_collate_packed if is_packed(rows) else collate


def _metric_logger(cfg: DictConfig) -> Any:
    printed = io.StringIO()
    is_disk = str(cfg.metric_logger.get("_component_")).endswith(".DiskLogger")
    # It prints "Writing logs to", which the config says.
    with redirect_stdout(printed) if is_disk else nullcontext():
        return instantiate(cfg.metric_logger, "metric_logger")


def _run_log(cfg: DictConfig, device: torch.device, before: str) -> RunLog:
    metric_logger = None
    if rank_and_world_size()[0] == 0:
        metric_logger = _metric_logger(cfg)
        metric_logger.log_config(cfg)
    return RunLog(
        metric_logger,
        folder=Path(cfg.output_dir),
        device=device,
        every=cfg.get("log_every_n_steps") or 1,
        memory=bool(cfg.get("log_peak_memory_stats")),
        before=before,
    )
