"""Whether a learning-rate schedule fits the run it is for."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer
from torchtune import utils

from qst_tune.config.components import instantiate
from qst_tune.config.schema import TrainingConfig
from qst_tune.distributed.processes import is_main_process
from qst_tune.errors import UserError

# Longer runs are not checked, which takes 0.1 s here: nobody writes a warm-up of thousands of steps
# by mistake.
_LONGEST = 10_000
_OWN = "qst_tune.training.lr_schedulers.cosine_with_warmup"
# Adam moves a weight by about its rate a step: in fewer steps than this a new side network hardly
# leaves its start.
_FEW_STEPS = 20
_FIX = f"use lr_scheduler._component_={_OWN}, whose warm-up is a share of the run"

log = utils.get_logger("INFO")


def report_schedule(cfg: TrainingConfig, num_steps: int) -> None:
    """Warn, on the main process, of steps that a schedule wastes and of a very short run."""
    warnings = [*check_schedule(cfg, num_steps), *_few_steps(cfg, num_steps)]
    if is_main_process():
        for warning in warnings:
            log.warning(warning)


def check_schedule(cfg: TrainingConfig, num_steps: int) -> list[str]:
    """Return warnings of steps that a schedule wastes; UserError if every step has a rate of 0."""
    block = cfg.lr_scheduler
    full, rates = learning_rates(cfg, num_steps if num_steps <= _LONGEST else 0)
    if not full:
        raise UserError("optimizer: lr=0 changes nothing in any step: set it above 0")
    if block is None or not rates:
        return []
    if not any(rates):
        raise UserError(
            f"lr_scheduler: {block._component_} gives each of the run's {num_steps} steps a "
            f"learning rate of 0: {_FIX}, or set lr_scheduler=null"
        )
    return [*_long_warmup(block, full, rates), *_first_rate(block, rates)]


def learning_rates(cfg: TrainingConfig, num_steps: int) -> tuple[float, list[float]]:
    """Return the optimizer's own rate, and those of ``num_steps`` steps of its schedule."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer: Any = instantiate(cfg.optimizer, "optimizer", [parameter])
    full = float(optimizer.param_groups[0]["lr"])
    if not num_steps:
        return full, []
    # The config's optimizer is never stepped, and torch would warn of that.
    plain = torch.optim.SGD([parameter], lr=full)
    scheduler = build_lr_scheduler(cfg, plain, num_steps)
    if scheduler is None:
        return full, []
    rates = []
    for _ in range(num_steps):
        rates.append(float(plain.param_groups[0]["lr"]))
        plain.step()
        scheduler.step()
    return full, rates


def build_lr_scheduler(cfg: TrainingConfig, optimizer: Optimizer, num_steps: int) -> Any:
    """Build the schedule of a run of ``num_steps`` steps; None if the rate is constant."""
    if not cfg.lr_scheduler:
        return None
    settings = {"num_training_steps": num_steps, "last_epoch": -1}
    return instantiate(cfg.lr_scheduler, "lr_scheduler", optimizer, **settings)


def _few_steps(cfg: TrainingConfig, num_steps: int) -> list[str]:
    """Warn of a small file's run, unless it was made short on purpose."""
    if num_steps >= _FEW_STEPS or cfg.max_steps_per_epoch:
        return []
    epochs = -(-_FEW_STEPS * cfg.epochs // num_steps)
    return [
        f"the run has {num_steps} optimizer {'step' if num_steps == 1 else 'steps'}, too few to "
        f"learn much: set epochs={epochs} or more, or lower gradient_accumulation_steps"
    ]


def _long_warmup(block: DictConfig, full: float, rates: list[float]) -> list[str]:
    """Warn of a warm-up of more than half of the run."""
    num_steps, asked = len(rates), block.get("num_warmup_steps")
    highest = max(rates)
    named = "" if asked is None else f"num_warmup_steps={asked}, and "
    if block._component_ == _OWN and asked is not None and asked > num_steps // 2:
        return [
            f"lr_scheduler: {named}the run has {num_steps} steps: the warm-up is shortened to "
            f"{num_steps // 2}"
        ]
    if num_steps < 2 or rates[0] == highest or 2 * rates.index(highest) <= num_steps:
        return []
    return [
        f"lr_scheduler: {named}the run has {num_steps} steps: its learning rate rises up to step "
        f"{rates.index(highest) + 1}, to {highest:.3g} of optimizer.lr={full:.3g}; {_FIX}"
    ]


def _first_rate(block: DictConfig, rates: list[float]) -> list[str]:
    if rates[0]:
        return []
    return [
        f"lr_scheduler: {block._component_} gives step 1 of {len(rates)} a learning rate of 0, so "
        f"it learns nothing; {_FIX.partition(',')[0]}"
    ]
