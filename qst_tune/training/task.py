"""What the training loop asks of a task, and how every task goes through its validation set."""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import nn
from torchtune import utils
from torchtune.modules import TransformerDecoder

from qst_tune.data.batches.loader import Batch
from qst_tune.distributed.sharding import anyone_has, free_weights, take_part
from qst_tune.errors import UserError


class Task(Protocol):
    """What is learnt. Its loss is a sum, so that the loop can weigh every label the same."""

    @property
    def monitor(self) -> str:
        """Name of the figure of :meth:`evaluate` that decides which step is the best."""

    @property
    def higher_is_better(self) -> bool:
        """Direction of that figure."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the model on one batch, on the model's device; ``tokens`` are ``[B, T]``.

        Returns the sum of the losses, to be differentiated, and the number of labels in it. Without
        a label both are zero.
        """

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Measure on the validation set. Collective: all ranks call it and get the same figures.

        ``batches`` are this process's share, on the CPU; ``val_loss`` among the figures is plotted.
        """


@torch.no_grad()
def visit(
    model: TransformerDecoder,
    batches: Iterable[Batch],
    device: torch.device,
    take: Callable[[Batch], None],
) -> UserError | None:
    """Hand each batch to a function, while the model is in evaluation mode.

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
            try:
                if batch is not None:
                    utils.batch_to_device(batch, device)
                    take(batch)
            except UserError as caught:
                error = caught
            if batch is None or error is not None:
                take_part(model, device)
    finally:
        model.train(was_training)
        free_weights(model)
