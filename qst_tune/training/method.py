"""What the training loop asks of a method and of a task; it knows nothing else of either.

A method says what the model is, what of it trains and what a user gets: QST, PEQA. A task says what
is learnt: the loss of a batch, and the figures of held-out data. Any method goes with any task that
takes its model's output.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

Batch = dict[str, torch.Tensor]


class Method(Protocol):
    """A model on its device, filled from its checkpoint, with the parameters that train."""

    @property
    def model(self) -> nn.Module:
        """Takes a batch's ``tokens`` ``[B, T]`` and, where the batch has them, further inputs."""

    @property
    def result_name(self) -> str:
        """Name of the folder in ``output_dir`` that the result is written to."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups; their parameters are those that train, and no others."""

    def files(self, results: dict[str, float]) -> dict[str, bytes]:
        """Return everything that training has changed as files by name, no pickle.

        ``results`` are figures for the model card.
        """

    def load(self, folder: Path) -> None:
        """Load a directory of :meth:`files`, bit for bit; UserError if it does not fit."""

    def statistics(self) -> dict[str, float]:
        """Return what the method would like logged besides the loss; may be empty."""


class Task(Protocol):
    """What is learnt. Its loss is a sum, so that the loop can weigh every label the same."""

    @property
    def monitor(self) -> str:
        """Name of the figure of :meth:`evaluate` that says which step is the best."""

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
