"""The task of language modelling: predict each next token."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torchtune.modules import TransformerDecoder

from qst_tune.training.data import check_length
from qst_tune.training.loss import next_token_loss
from qst_tune.training.method import Batch
from qst_tune.training.validation import held_out_loss


@dataclass(frozen=True)
class NextTokenTask:
    """Cross entropy of each next token; see :class:`~qst_tune.training.method.Task`.

    ``loss_function`` is connected to the model by ``connect_loss``.
    """

    loss_function: Any
    device: torch.device

    monitor: ClassVar[str] = "val_loss"
    higher_is_better: ClassVar[bool] = False

    def loss(self, model: TransformerDecoder, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the losses, in nats, and the number of labels of a batch ``[B, T]``."""
        check_length(batch["tokens"], model.max_seq_len)
        mean, num_labels = next_token_loss(model, self.loss_function, batch)
        return mean * num_labels, num_labels

    def evaluate(self, model: TransformerDecoder, batches: Iterable[Batch]) -> dict[str, float]:
        """Return ``val_loss``, the mean over every label, in nats a token."""
        return {"val_loss": held_out_loss(model, self.loss_function, batches, self.device)}
