"""What the training loop asks of a method and of a task; it knows nothing else of either.

A method (QST, PEQA) has the model, its trainable parameters and the result for the user. A task has
the loss of a batch and the figures of the validation set. Any method goes with any task that takes
its model's output.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from qst_tune.data.batches import Batch


class Method(Protocol):
    """A model on its device, with its weights loaded, and its trainable parameters."""

    @property
    def model(self) -> nn.Module:
        """Takes a batch's ``tokens`` ``[B, T]`` and, where the batch has them, further inputs."""

    @property
    def result_name(self) -> str:
        """Name of the directory in ``output_dir`` that the result is written to."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups, which contain exactly the trainable parameters."""

    def files(self, results: dict[str, float]) -> dict[str, bytes]:
        """Return everything that training has changed as files by name, no pickle.

        ``results`` are figures for the model card.
        """

    def load(self, directory: Path) -> None:
        """Load a directory of :meth:`files`, bit for bit; UserError if it does not fit."""

    def statistics(self) -> dict[str, float]:
        """Return what the method would like logged besides the loss; may be empty."""


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
