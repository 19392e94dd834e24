"""What ``dry_run=true`` of a training recipe says: the run and its memory, without doing it."""

import warnings

import torch
from omegaconf import DictConfig

from qst_tune.errors import UserError
from qst_tune.estimation.methods import METHODS, Choices
from qst_tune.estimation.report import Row, table
from qst_tune.estimation.spread import Spread, spread_line
from qst_tune.estimation.step import Shape, estimate_step
from qst_tune.training.distributed import rank_and_world_size
from qst_tune.training.schedule import schedule_of
from qst_tune.training.training_data import TrainingData

# Taken where tokenizer.max_seq_len is null, since rows are then as long as the data.
DEFAULT_SEQ_LEN = 512


def describe_run(
    cfg: DictConfig,
    method_name: str | None,
    data: TrainingData,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """Describe a run that would begin now: steps, rows, and the parts of the peak memory.

    Args:
        cfg (DictConfig): of the run, checked.
        method_name (str | None): a row of ``estimation.methods.METHODS``; None for a task whose
            memory is not estimated.
        data (TrainingData): of the run.
        device (torch.device): of the run.
        dtype (torch.dtype): of what is not quantised.

    Returns:
        str: a few lines.

    Raises:
        UserError: if memory on the device cannot be estimated.
    """
    schedule = schedule_of(cfg, data.train)
    held_out = len(data.held_out.dataset) if data.held_out else 0
    steps = (
        f"dry run: {schedule.num_steps} steps in {schedule.epochs} epochs of "
        f"{len(data.train.dataset)} rows, {held_out} rows held out; nothing was written"
    )
    if method_name is None:
        return f"{steps}\nthe memory of this task is not estimated"
    return f"{steps}\n{_memory(cfg, method_name, device, dtype)}"


def _memory(cfg: DictConfig, method_name: str, device: torch.device, dtype: torch.dtype) -> str:
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"dry_run: memory on device={device} cannot be estimated: use cpu or cuda")
    shape = Shape(cfg.batch_size, cfg.tokenizer.get("max_seq_len") or DEFAULT_SEQ_LEN)
    method = METHODS[method_name]
    with warnings.catch_warnings():
        # Said by torch of torchtune's own norms, whose weights are bf16 and inputs fp32.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        cost = estimate_step(
            method,
            Choices(cfg, dtype),
            shape,
            device="cuda" if device.type == "cuda" else "cpu",
        )
    lines = [
        f"peak memory of a step of {shape.batch_size} x {shape.seq_len} tokens and its parts, "
        "GiB (2^30 bytes)",
        table({method_name: Row(method.title, cost)}),
    ]
    spread = Spread.of_config(cfg, rank_and_world_size()[1])
    if spread.num_processes > 1:
        model = method.build(Choices(cfg, dtype)).model
        lines.append(spread_line(spread, model, cost.memory.num_bytes))
    return "\n".join(lines)
