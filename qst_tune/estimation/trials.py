"""What trials cost before they run: memory and operations of a step of all of them."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from omegaconf import OmegaConf
from torch import nn

from qst_tune.config.schema import StepConfig
from qst_tune.errors import UserError
from qst_tune.estimation.estimate import quick_and_quiet
from qst_tune.estimation.fake_device import (
    Attention,
    DeviceType,
    allocate_fake,
    device_kernels,
    fake_tensors,
    workspace_of,
)
from qst_tune.estimation.step import (
    CUDA_GRANULARITY,
    Setup,
    Shape,
    make_optimizer,
    own_setup,
    train_step,
)
from qst_tune.estimation.tracker import StorageTracker
from qst_tune.estimation.watch import watched
from qst_tune.modules.memory import GIB
from qst_tune.modules.meta_device import build_rotary_caches
from qst_tune.modules.shared_pass import SharedPass
from qst_tune.training.trials import use_side


@dataclass(frozen=True)
class _Kind:
    """Trials of one shape: bytes that one more of them takes, operations of its turn."""

    num_bytes: int  # of its side network and its optimizer's states
    flops: int


@dataclass(frozen=True)
class TrialsCost:
    """Peak and operations of a step of so many trials, of the first ones in their order.

    A trial of each kind has run, after the first trial, whose turn has the frozen pass. Trials of
    one kind differ in nothing that a step takes, so more of them add the same.
    """

    kinds: Sequence[_Kind]  # of each trial
    traced_peak: int  # of the first trial and one of each kind
    traced_bytes: int  # of their side networks and optimizers
    first_flops: int  # of the first trial's turn

    def peak_bytes(self, count: int) -> int:
        """Return the peak of the first ``count`` trials."""
        return self.traced_peak - self.traced_bytes + sum(k.num_bytes for k in self.kinds[:count])

    def runs(self, count: int) -> float:
        """Return the operations of ``count`` trials over those of the first one."""
        return 1 + sum(kind.flops for kind in self.kinds[1:count]) / self.first_flops

    def most_that_fit(self, limit: float) -> int:
        """Return how many of the first trials fit into so many bytes."""
        counts = range(1, len(self.kinds) + 1)
        return max((count for count in counts if self.peak_bytes(count) <= limit), default=0)

    def line(self, limit_gib: float | None = None) -> str:
        """Say what all of them take, and how many fit."""
        count = len(self.kinds)
        text = (
            f"{count} trials: peak {self.peak_bytes(count) / GIB:.2f} GiB, {self.runs(count):.2f} "
            "times the operations of one run"
        )
        if limit_gib is None:
            return text
        return f"{text}; of them {self.most_that_fit(limit_gib * GIB)} fit in {limit_gib:g} GiB"

    def figures(self) -> dict[str, object]:
        """Return what estimate.json has of them."""
        count = len(self.kinds)
        return {
            "trials": {
                "number": count,
                "peak_bytes": self.peak_bytes(count),
                "runs": self.runs(count),
            }
        }

    def check(self, device: torch.device) -> None:
        """Refuse, with a UserError, more trials than fit on a CUDA device."""
        if device.type != "cuda":
            return
        limit = torch.cuda.get_device_properties(device).total_memory
        count, most = len(self.kinds), self.most_that_fit(limit)
        if most < count:
            raise UserError(
                f"trials: {count} take {self.peak_bytes(count) / GIB:.1f} GiB, and {device} has "
                f"{limit / GIB:.1f}: {most} of them fit"
            )


def trials_cost(
    configs: Sequence[StepConfig],
    dtype: torch.dtype,
    shape: Shape,
    device: DeviceType,
    attention: Attention = "fused",
) -> TrialsCost:
    """Run a step of trials in turn on fake tensors, as ``take_turns`` does; no weights are needed.

    ``configs`` are of the trials; UserError if a model cannot be built.
    """
    names = [_name_of_kind(cfg) for cfg in configs]
    first_of = {name: names.index(name) for name in names}
    turns = [configs[0], *(configs[index] for index in first_of.values())]
    setups = [own_setup(cfg, dtype) for cfg in turns]
    with quick_and_quiet():
        found = _trace(setups, turns, shape, device, attention)
    each = dict(zip(first_of, map(_Kind, found.own_bytes[1:], found.flops[1:]), strict=True))
    traced = sum(found.own_bytes)
    return TrialsCost([each[name] for name in names], found.peak_bytes, traced, found.flops[0])


def _name_of_kind(cfg: StepConfig) -> str:
    """What a step's memory and operations depend on."""
    start = "" if cfg.side_network is None else "start"
    return f"{OmegaConf.to_yaml(cfg.model)}{cfg.optimizer._component_}{start}"


@dataclass(frozen=True)
class TurnsCost:
    """What trials took in one step: bytes of each one's own, operations of each turn, the peak."""

    own_bytes: list[int]
    flops: list[int]
    peak_bytes: int


def _trace(
    setups: Sequence[Setup],
    configs: Sequence[StepConfig],
    shape: Shape,
    device: DeviceType,
    attention: Attention,
) -> TurnsCost:
    """Run a step of each in turn, on fake tensors, over the model of the first."""
    model, others = setups[0].model, [one.model.side for one in setups[1:]]
    references = [one.model.reference_side for one in setups]
    modules = [model, *others, *(one for one in references if one is not None)]
    for module in modules[: len(setups)]:
        build_rotary_caches(module, torch.device("cpu"))
    with fake_tensors(setups[0].dtype):
        for module in modules:
            allocate_fake(module, device)
        return run_turns(setups, configs, shape, device=device, attention=attention)


def run_turns(
    setups: Sequence[Setup],
    configs: Sequence[StepConfig],
    shape: Shape,
    *,
    device: DeviceType,
    attention: Attention = "fused",
) -> TurnsCost:
    """Run a tracked step of each in turn, on tensors that exist, fake or real."""
    setup, model = setups[0], setups[0].model
    granularity = CUDA_GRANULARITY if device == "cuda" else 1
    tracker = StorageTracker(granularity=granularity, workspace=workspace_of(device))
    sides = [(one.model.side, one.model.reference_side) for one in setups]
    optimizers, own_bytes, flops = [], [], []
    for own, cfg in zip(sides, configs, strict=True):
        use_side(model, *own)
        optimizers.append(make_optimizer(setup, cfg, device))
    batch = setup.batch(shape)
    tracker.register([*model.parameters(), *model.buffers(), batch], "frozen weights")
    for own, optimizer in zip(sides, optimizers, strict=True):
        held = _tensors(*own, optimizer.state)
        tracker.register(held, "optimizer states")
        own_bytes.append(sum(-(-one.nbytes // granularity) * granularity for one in held))
    model.shared_pass = SharedPass([side for side, _ in sides])
    model.shared_pass.begin(len(sides))
    gc.collect()
    with device_kernels(device, attention, tracker.repeat), tracker:
        for own, optimizer, cfg in zip(sides, optimizers, configs, strict=True):
            use_side(model, *own)
            before = tracker.flops
            with watched(tracker, model, setup.task.loss_function):
                train_step(setup, optimizer, batch, cfg.clip_grad_norm, tracker)
            flops.append(tracker.flops - before)
    return TurnsCost(own_bytes, flops, tracker.peak().num_bytes)


def _tensors(
    side: nn.Module,
    reference: nn.Module | None,
    states: Mapping[torch.Tensor, Mapping[str, object]],
) -> list[torch.Tensor]:
    """All that a trial holds between its turns."""
    modules = [side] if reference is None else [side, reference]
    held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    of_optimizer = [value for state in states.values() for value in state.values()]
    return [*held, *(value for value in of_optimizer if isinstance(value, torch.Tensor))]
