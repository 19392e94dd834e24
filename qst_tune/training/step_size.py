"""How many rows make a step: fewer than the config says where a dataset does not have as many."""

from omegaconf import DictConfig

from qst_tune.errors import UserError
from qst_tune.training.distributed import rank_and_world_size


def fit_step(cfg: DictConfig, num_rows: int) -> tuple[int, int]:
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
    batch_size, accumulation = cfg.batch_size, cfg.get("gradient_accumulation_steps") or 1
    if share >= batch_size * accumulation:
        return batch_size, accumulation
    num_batches = -(-share // batch_size)
    return share // num_batches, num_batches


def describe_step(cfg: DictConfig, num_rows: int, *, noun: str = "rows") -> str | None:
    """Describe in one line what an epoch leaves out, and a fitted step; None if neither."""
    world_size = rank_and_world_size()[1]
    batch_size, accumulation = fit_step(cfg, num_rows)
    of_a_step = batch_size * accumulation * world_size
    wanted = cfg.batch_size * (cfg.get("gradient_accumulation_steps") or 1) * world_size
    left_out = num_rows % of_a_step
    rest = f"; each epoch leaves out {left_out}, drawn anew" if left_out else ""
    if of_a_step != wanted:
        return (
            f"dataset: {num_rows} {noun} are fewer than the {wanted} of a step (batch_size="
            f"{cfg.batch_size} x gradient_accumulation_steps x processes): a step has {of_a_step}, "
            f"as {accumulation} x {batch_size}{rest}"
        )
    return f"dataset: a step has {of_a_step} of {num_rows:,} {noun}{rest}" if left_out else None
