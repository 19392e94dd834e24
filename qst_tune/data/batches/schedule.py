"""How long a run takes, how many rows make a step, and when the run validates and stops."""

from dataclasses import dataclass

from qst_tune.config.schema import TrainingConfig
from qst_tune.data.batches.loader import BatchLoader
from qst_tune.distributed.processes import rank_and_world_size
from qst_tune.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """When what happens, in optimizer steps."""

    epochs: int  # passes over the data
    steps_per_epoch: int
    accumulation: int = 1  # batches a step
    validate_every: int | None = None  # besides the start and the end of each epoch
    patience: int | None = None  # stop after so many validations in a row without a best one
    max_bad_steps: int = 0  # skip so many steps whose loss or gradient is not finite

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def validates_after(self, step: int) -> bool:
        """Whether the run validates after so many steps."""
        every = self.validate_every
        return step % self.steps_per_epoch == 0 or bool(every and step % every == 0)

    def is_stale(self, validations_since_best: int) -> bool:
        """Whether ``patience`` is over."""
        return self.patience is not None and validations_since_best >= self.patience


def schedule_of(cfg: TrainingConfig, train: BatchLoader) -> Schedule:
    """Return when what happens in a run; UserError if there are fewer rows than processes."""
    _, accumulation = fit_step(cfg, len(train.dataset))
    steps = len(train) // accumulation
    return Schedule(
        epochs=cfg.epochs,
        steps_per_epoch=min(steps, cfg.max_steps_per_epoch or steps),
        accumulation=accumulation,
        validate_every=cfg.run_val_every_n_steps,
        patience=cfg.early_stopping_patience,
        max_bad_steps=cfg.skip_bad_steps,
    )


def fit_step(cfg: TrainingConfig, num_rows: int) -> tuple[int, int]:
    """Return rows a batch and batches a step of each process, such that an epoch has a step.

    Those of the config, or as few and as even batches as hold all ``num_rows`` of all processes.
    UserError if a process has no row.
    """
    world_size = rank_and_world_size()[1]
    share = num_rows // world_size
    if not share:
        raise UserError(
            f"dataset: {num_rows} rows are fewer than the {world_size} processes that share them: "
            "start fewer with --nproc_per_node"
        )
    batch_size, accumulation = cfg.batch_size, cfg.gradient_accumulation_steps
    if share >= batch_size * accumulation:
        return batch_size, accumulation
    num_batches = -(-share // batch_size)
    return share // num_batches, num_batches


def describe_step(cfg: TrainingConfig, num_rows: int, *, noun: str = "rows") -> str | None:
    """Describe in one line what an epoch leaves out, and a fitted step; None if neither."""
    world_size = rank_and_world_size()[1]
    batch_size, accumulation = fit_step(cfg, num_rows)
    of_a_step = batch_size * accumulation * world_size
    wanted = cfg.batch_size * cfg.gradient_accumulation_steps * world_size
    left_out = num_rows % of_a_step
    rest = f"; each epoch leaves out {left_out}, drawn anew" if left_out else ""
    if of_a_step != wanted:
        return (
            f"dataset: {num_rows} {noun} are fewer than the {wanted} of a step (batch_size="
            f"{cfg.batch_size} x gradient_accumulation_steps x processes): a step has {of_a_step}, "
            f"as {accumulation} x {batch_size}{rest}"
        )
    return f"dataset: a step has {of_a_step} of {num_rows:,} {noun}{rest}" if left_out else None
