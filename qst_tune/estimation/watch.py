"""What a tracked step reports to its tracker: phases, layers and gradients."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from qst_tune.estimation.skipped_layers import runs
from qst_tune.estimation.tracker import StorageTracker
from qst_tune.modules import fused_layers, torchtune_backbone
from qst_tune.modules.fused_layers import add_attention
from qst_tune.modules.qst_model import QSTModel


@contextmanager
def watched(tracker: StorageTracker, model: Any, loss: nn.Module) -> Iterator[None]:
    """Report to the tracker layers, gradients, and where head and loss begin and end."""
    with ExitStack() as stack:
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            hook = parameter.register_post_accumulate_grad_hook(
                lambda p: tracker.register(p.grad, "gradients")
            )
            stack.callback(hook.remove)
        if isinstance(model, QSTModel):
            for index, layer in enumerate(model.layers):
                if runs(layer):
                    _watch_layer(stack, tracker, index, layer)
            _watch_halves(stack, tracker, list(model.layers))
        for module in (_head_of(model), loss):
            before = module.register_forward_pre_hook(
                lambda _, inputs: _enter_loss(tracker, inputs[0])
            )
            stack.callback(before.remove)
        yield


def _watch_layer(stack: ExitStack, tracker: StorageTracker, index: int, layer: nn.Module) -> None:
    """Report where a layer begins, and where its backward pass does, if it has one."""

    def begin(*_: object) -> None:
        tracker.enter_layer(index)

    def end(_: nn.Module, __: object, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        if state.requires_grad:
            state.register_hook(begin)

    stack.callback(layer.register_forward_pre_hook(begin).remove)
    stack.callback(layer.register_forward_hook(end).remove)


def _watch_halves(stack: ExitStack, tracker: StorageTracker, layers: list[nn.Module]) -> None:
    """Report where a layer begins that is not called: its hooks would let it be called."""

    def begin(layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        tracker.enter_layer(next(i for i, other in enumerate(layers) if other is layer))
        return add_attention(layer, *args, **kwargs)

    stack.enter_context(patch.object(torchtune_backbone, "add_attention", begin))
    stack.enter_context(patch.object(fused_layers, "has_hooks", lambda layer: False))


def _head_of(model: Any) -> nn.Module:
    """The LM head, which may be torchtune's TiedLinear around a module."""
    output = model.output
    return output if isinstance(output, nn.Module) else output.linear


def _enter_loss(tracker: StorageTracker, hidden: object) -> None:
    """The head's input begins the loss; its gradient ends the loss's backward pass."""
    if tracker.phase == "loss" or not isinstance(hidden, torch.Tensor):
        tracker.enter("loss")
        return
    tracker.enter("loss")
    if hidden.requires_grad:
        source = hidden if hidden._base is None else hidden._base
        source.register_hook(lambda _: tracker.enter("backward"))
