"""What the training loop needs of a task, and how a task goes through its batches."""

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import BlockMask
from torchtune import utils
from torchtune.modules import TransformerDecoder

from qst_tune.data.batches.loader import Batch
from qst_tune.distributed.sharding import anyone_has, free_weights, take_part
from qst_tune.errors import UserError
from qst_tune.modules.qst_model import QSTModel
from qst_tune.training.monitor import Monitor

# Tokens that layers with LoRA compute at once: what one of them keeps is half a GiB at 7B.
TOKENS_AT_ONCE = 4096

T = TypeVar("T")
# A generator that runs the model once after each yield; others may use the model in between.
Passes: TypeAlias = Generator[None, None, T]
# The position of a run before a pass: step, validation (0) or training (1), number of the batch.
Turn: TypeAlias = tuple[int, int, int]
Turns: TypeAlias = Generator[Turn, None, T]


class GivenUp(Exception):  # noqa: N818  # no error: others are better
    """Thrown into a run between two steps to end it; the message is the reason."""


class Task(Protocol):
    """What is learnt. Its loss is a sum, so that the loop can weigh every label the same."""

    @property
    def monitor(self) -> Monitor:
        """Which figure of :meth:`evaluating` decides which step is the best."""

    @property
    def rows_an_example(self) -> int:
        """Rows that an example has in a batch: n of E examples has rows n, n + E, n + 2 E ..."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the model on one batch, on the model's device; ``tokens`` are ``[B, T]``.

        Returns the sum of the losses, to be differentiated, and the number of labels in it. Without
        a label both are zero.
        """

    def take_part(self, model: nn.Module) -> None:
        """Go through a sharded model as :meth:`loss` does, for the processes that have a batch."""

    def evaluating(self, model: nn.Module, batches: Iterable[Batch]) -> Passes[dict[str, float]]:
        """Measure on the validation set. Collective: all ranks call it and get the same figures.

        ``batches`` are this process's share, on the CPU; ``val_loss`` among the figures is plotted.
        """


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch on the device; Python does not wait until it is on a GPU."""
    return {name: _on_device(value, device) for name, value in batch.items()}


def _on_device(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    # A BlockMask, of packed rows on CUDA, is no tensor.
    if device.type == "cuda" and isinstance(value, torch.Tensor) and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def parts_of(task: Task, model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """Split a batch into rows whose gradients, one part after the other, add up to the batch's.

    Layers with LoRA save activations, in memory that grows with their tokens; without LoRA a batch
    is one part. It is also one part under FSDP, whose processes gather layers in step, and with the
    BlockMask of packed rows, which counts rows from the first of the batch.
    """
    side = model.side if isinstance(model, QSTModel) else None
    is_whole = side is None or side.lora is None or isinstance(model, FSDPModule)
    if is_whole or isinstance(batch.get("mask"), BlockMask):
        yield batch
        return
    tokens, apart = batch["tokens"], task.rows_an_example
    examples, rows = len(tokens) // apart, max(1, TOKENS_AT_ONCE // (tokens.shape[1] * apart))
    if rows >= examples:
        yield batch
        return
    of_rows = {name for name, part in batch.items() if len(part) == len(tokens)}
    for start in range(0, examples, rows):
        example = torch.arange(start, min(start + rows, examples), device=tokens.device)
        index = torch.cat([example + examples * n for n in range(apart)])
        yield {name: part[index] if name in of_rows else part for name, part in batch.items()}


def complete(passes: Passes[T]) -> T:
    """Run passes to their end; return their result."""
    while True:
        try:
            next(passes)
        except StopIteration as end:
            value: T = end.value
            return value


def in_turns(passes: Passes[T], step: int, phase: int) -> Turns[T]:
    """Yield the position before each pass; return the result of the passes."""
    number = 0
    while True:
        try:
            next(passes)
        except StopIteration as end:
            value: T = end.value
            return value
        yield step, phase, number
        number += 1


@torch.no_grad()
def visit(
    model: TransformerDecoder,
    batches: Iterable[Batch],
    device: torch.device,
    take: Callable[[Batch], None],
    run: Callable[[torch.Tensor], Any] | None = None,
) -> Passes[UserError | None]:
    """Call ``take`` on each batch while the model is in evaluation mode, a pass for each batch.

    ``run`` goes through the model's layers as ``take`` does; None: ``take`` calls the model once.

    Collective if the model is sharded: a process that has no more batches, or a row that cannot be
    used, continues to gather weights with the others. Returns the error of such a row for
    :func:`sum_or_fail`: the other processes have to hear of it.
    """
    was_training = model.training
    model.eval()
    rest, error = iter(batches), None
    try:
        while True:
            batch = None
            try:
                batch = next(rest, None) if error is None else None
            except UserError as caught:
                error = caught
            if not anyone_has(batch, model, device):
                return error
            yield
            try:
                if batch is not None:
                    utils.batch_to_device(batch, device)
                    take(batch)
            except UserError as caught:
                error = caught
            if batch is None or error is not None:
                take_part(model, device, run)
    finally:
        model.train(was_training)
        free_weights(model)
