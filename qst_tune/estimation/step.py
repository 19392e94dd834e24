"""One training step on fake tensors, and what it costs."""

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torchtune import training

from qst_tune.config.components import instantiate
from qst_tune.config.schema import StepConfig
from qst_tune.errors import UserError
from qst_tune.estimation.depth import Shorten
from qst_tune.estimation.fake_device import (
    Attention,
    DeviceType,
    allocate_fake,
    device_kernels,
    fake_tensors,
    workspace_of,
)
from qst_tune.estimation.setup import Setup, Shape
from qst_tune.estimation.tracker import PeakMemory, StorageTracker, Timeline
from qst_tune.modules.meta_device import build_rotary_caches

_CPU = torch.device("cpu")
CUDA_GRANULARITY = 512  # bytes, of torch's caching allocator


@dataclass(frozen=True)
class StepCost:
    """What one training step takes.

    Args:
        memory (PeakMemory): peak in the steady state, when the optimizer has its states.
        flops_per_token (float): forward and backward, recomputation included.
        trainable_parameters (int): number of them.
    """

    memory: PeakMemory
    flops_per_token: float
    trainable_parameters: int


def trace_step(
    setup: Setup,
    cfg: StepConfig,
    shape: Shape,
    *,
    device: DeviceType,
    attention: Attention = "fused",
    shorten: Shorten | None = None,
) -> tuple[StepCost, Timeline]:
    """Run one training step on fake tensors: what it costs, and every allocation.

    The setup is on meta and used up. ``cfg`` has ``optimizer`` and perhaps ``clip_grad_norm``;
    ``attention`` counts unless the setup has its own; ``shorten`` changes the model first, in
    place. UserError if a row is longer than the model's longest sequence.
    """
    if shorten is not None:
        shorten(setup.model)
    longest = setup.model.max_seq_len
    if shape.seq_len > longest:
        raise UserError(
            f"tokenizer.max_seq_len={shape.seq_len} is longer than the model's max_seq_len "
            f"{longest}: lower it"
        )
    # Real ones first, since Llama 3's code reads what it puts into them.
    build_rotary_caches(setup.model, _CPU)
    with fake_tensors(setup.dtype):
        for module in _modules(setup):
            allocate_fake(module, device)
        return run_step(setup, cfg, shape, device=device, attention=setup.attention or attention)


def run_step(
    setup: Setup, cfg: StepConfig, shape: Shape, *, device: DeviceType, attention: Attention
) -> tuple[StepCost, Timeline]:
    """Run one tracked training step on tensors that exist, fake or real; as :func:`trace_step`."""
    optimizer = make_optimizer(setup, cfg, device)
    batch = setup.batch(shape)
    tracker = StorageTracker(
        granularity=CUDA_GRANULARITY if device == "cuda" else 1, workspace=workspace_of(device)
    )
    _register(tracker, setup, optimizer, batch)
    gc.collect()
    kernels = device_kernels(device, attention, tracker.repeat)
    with kernels, tracker, _watch(tracker, setup):
        train_step(setup, optimizer, batch, cfg.clip_grad_norm, tracker)
    cost = StepCost(
        memory=tracker.peak(),
        flops_per_token=tracker.flops() / batch["tokens"].numel(),
        trainable_parameters=sum(p.numel() for p in _trainable(setup.model)),
    )
    return cost, tracker.timeline()


def make_optimizer(setup: Setup, cfg: StepConfig, device: DeviceType) -> Optimizer:
    """Build the config's optimizer, with its states as after a first step.

    CUDA's default is to update all parameters in one kernel a step. No parameter has a gradient.
    """
    optimizer: Optimizer = instantiate(cfg.optimizer, "optimizer", setup.trainable())
    for group in optimizer.param_groups:
        if device == "cuda" and group.get("foreach", 0) is None and not group.get("fused"):
            group["foreach"] = True
    for parameter in _trainable(setup.model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def train_step(
    setup: Setup,
    optimizer: Optimizer,
    batch: dict[str, torch.Tensor],
    clip_grad_norm: float | None,
    tracker: StorageTracker | None = None,
) -> None:
    """Do what the recipes do in one step; ours and torchtune's agree in it.

    ``batch`` is from ``Setup.batch``; the tracker gets the phases.
    """
    enter = tracker.enter if tracker else lambda _: None
    enter("forward")
    loss_sum, num_labels = setup.task.loss(setup.model, batch)
    enter("loss backward")
    loss_sum.backward()
    enter("optimizer")
    training.scale_grads(setup.model, 1 / num_labels)
    if clip_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(_trainable(setup.model), max_norm=float(clip_grad_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _modules(setup: Setup) -> list[nn.Module]:
    """The model, and the frozen side network that is the reference of DPO."""
    reference = getattr(setup.model, "reference_side", None)
    return [setup.model] if reference is None else [setup.model, reference]


def _register(
    tracker: StorageTracker, setup: Setup, optimizer: Optimizer, batch: dict[str, Any]
) -> None:
    trainable = _trainable(setup.model)
    for module in _modules(setup):
        tracker.register([*module.parameters(), *module.buffers()], "frozen weights")
    tracker.register(trainable, "trainable weights")
    tracker.register(list(optimizer.state.values()), "optimizer states")
    tracker.register(batch, "saved activations")


@contextmanager
def _watch(tracker: StorageTracker, setup: Setup) -> Iterator[None]:
    """Report to the tracker where head and loss begin and end, and which tensors are gradients."""
    with ExitStack() as stack:
        for parameter in _trainable(setup.model):
            hook = parameter.register_post_accumulate_grad_hook(
                lambda p: tracker.register(p.grad, "gradients")
            )
            stack.callback(hook.remove)
        for module in _head_and_loss(setup):
            before = module.register_forward_pre_hook(
                lambda _, inputs: _enter_loss(tracker, inputs[0])
            )
            stack.callback(before.remove)
        yield


def _head_and_loss(setup: Setup) -> list[nn.Module]:
    """The LM head, which may be torchtune's TiedLinear around a module, and the loss."""
    output, loss = setup.model.output, setup.task.loss_function
    return [output if isinstance(output, nn.Module) else output.linear, loss]


def _enter_loss(tracker: StorageTracker, hidden: Any) -> None:
    """The head's input begins the loss; its gradient ends the loss's backward pass."""
    if tracker.phase == "loss" or not isinstance(hidden, torch.Tensor):
        tracker.enter("loss")
        return
    tracker.enter("loss")
    if hidden.requires_grad:
        source = hidden if hidden._base is None else hidden._base
        source.register_hook(lambda _: tracker.enter("backward"))
