"""What ``dry_run`` of a training recipe prints."""

from collections.abc import Sequence

import torch

from qst_tune.config.schema import TrainingConfig
from qst_tune.data.batches.schedule import schedule_of
from qst_tune.data.batches.training_data import TrainingData
from qst_tune.distributed.processes import rank_and_world_size
from qst_tune.errors import UserError
from qst_tune.estimation.estimate import DEFAULT_SEQ_LEN, EstimateRequest, table
from qst_tune.estimation.spread import Spread
from qst_tune.estimation.step import Shape, own_setup
from qst_tune.estimation.trials import trials_cost


def describe_run(
    cfg: TrainingConfig,
    data: TrainingData,
    device: torch.device,
    dtype: torch.dtype,
    trials: Sequence[TrainingConfig] = (),
) -> str:
    """Describe a run that would begin now, for ``dry_run``: its steps, rows and peak memory.

    UserError if memory on the device cannot be estimated, or so many ``trials`` do not fit on it.
    """
    schedule = schedule_of(cfg, data.train)
    num_validation = len(data.validation.dataset) if data.validation else 0
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"dry_run: memory on device={device} cannot be estimated: use cpu or cuda")
    shape = Shape(cfg.batch_size, cfg.tokenizer.get("max_seq_len") or DEFAULT_SEQ_LEN)
    request = EstimateRequest(
        lambda: own_setup(cfg, dtype),
        cfg,
        shape,
        device="cuda" if device.type == "cuda" else "cpu",
        spread=Spread.of_config(cfg, rank_and_world_size()[1]),
    )
    row, spread = request.answer()
    lines = [
        f"dry run: {schedule.num_steps} steps in {schedule.epochs} epochs of "
        f"{len(data.train.dataset)} rows, {num_validation} rows for validation; nothing was "
        "written",
        f"peak memory of a step of {shape.batch_size} x {shape.seq_len} tokens and its parts, "
        "GiB (2^30 bytes)",
        table([row]),
    ]
    if spread:
        lines.append(spread)
    if trials:
        cost = trials_cost(trials, dtype, shape, request.device)
        cost.check(device)
        lines.append(cost.line())
    return "\n".join(lines)
