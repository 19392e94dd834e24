"""The task of language modelling, predicting each next token, which all methods share."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torchtune.modules import TransformerDecoder

from qst_tune.config.components import instantiate
from qst_tune.config.schema import Block, TrainingConfig
from qst_tune.data.batches.loader import Batch
from qst_tune.data.batches.survey import NO_LABEL
from qst_tune.data.batches.training_data import (
    TEXT_KEY,
    TrainingData,
    build_data,
    check_rows,
    text_collate,
)
from qst_tune.distributed.processes import sum_or_fail
from qst_tune.distributed.sharding import take_part
from qst_tune.errors import UserError
from qst_tune.modules.loss import connect_loss, next_token_loss
from qst_tune.modules.model_limits import check_length, limits_of
from qst_tune.training.monitor import Monitor
from qst_tune.training.task import Passes, visit


@dataclass(frozen=True)
class NextTokenTask:
    """Cross entropy of each next token; see :class:`~qst_tune.training.task.Task`.

    ``loss_function`` is connected to the model by ``connect_loss``.
    """

    loss_function: Any
    device: torch.device

    monitor: ClassVar[Monitor] = Monitor("val_loss")
    rows_an_example: ClassVar[int] = 1

    def loss(self, model: TransformerDecoder, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the losses, in nats, and the number of labels of a batch ``[B, T]``."""
        check_length(batch["tokens"], model.max_seq_len)
        mean, num_labels = next_token_loss(model, self.loss_function, batch)
        return mean * num_labels, num_labels

    def take_part(self, model: nn.Module) -> None:
        """Run a sharded model on one token, as the processes do that have a batch."""
        take_part(model, self.device)

    def evaluating(
        self, model: TransformerDecoder, batches: Iterable[Batch]
    ) -> Passes[dict[str, float]]:
        """Return ``val_loss``, the mean over every label, in nats a token."""
        loss = yield from validation_passes(model, self.loss_function, batches, self.device)
        return {"val_loss": loss}


def build_language_modelling(
    cfg: TrainingConfig,
    tokenizer: Any,
    model: TransformerDecoder,
    *,
    seed: int,
    device: torch.device,
) -> tuple[NextTokenTask, TrainingData]:
    """Build the task of predicting each next token, and its data; connects loss and model."""
    loss = build_loss(cfg.loss)
    limits = limits_of(model, tokenizer, loss.ignore_index)
    data = build_data(cfg, limits, text_collate(cfg.collate_fn, limits), seed=seed)
    check_rows(data, TEXT_KEY)
    connect_loss(loss, model)
    return NextTokenTask(loss, device), data


def build_loss(block: Block) -> Any:
    """Build the config's loss; UserError if it cannot be built or has no ``ignore_index``."""
    loss = instantiate(block, "loss")
    if not hasattr(loss, "ignore_index"):
        raise UserError(
            f"loss: {block._component_} has no ignore_index, the label of tokens without loss; use "
            "a cross entropy such as qst_tune.modules.LinearCrossEntropyLoss"
        )
    return loss


def validation_passes(
    model: TransformerDecoder,
    loss: Any,
    batches: Iterable[dict[str, torch.Tensor]],
    device: torch.device,
) -> Passes[float]:
    """Mean loss in nats over every label of a dataset, on any number of devices, a batch a pass.

    UserError if a row is longer than the model can see, or none has a label.
    """
    total = torch.zeros(2, dtype=torch.float64)

    def add(batch: dict[str, torch.Tensor]) -> None:
        check_length(batch["tokens"], model.max_seq_len)
        mean, num_labels = next_token_loss(model, loss, batch)
        count = num_labels.double().cpu()
        total.add_(torch.stack([mean.double().cpu() * count, count]))

    error = yield from visit(model, batches, device, add)
    on_device = total.to(device if device.type == "cuda" else "cpu")
    summed, count = sum_or_fail(on_device, error).tolist()
    if not count:
        raise UserError(
            f"validation: none of its rows has a label, so nothing can be measured: {NO_LABEL}"
        )
    return float(summed / count)
