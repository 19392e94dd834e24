"""Validation: every batch once, in evaluation mode, and the loss on it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torchtune import utils
from torchtune.modules import TransformerDecoder

from qst_tune.backbone.sharding import anyone_has, free_weights, take_part
from qst_tune.data.label_check import NO_LABEL
from qst_tune.distributed.processes import sum_or_fail
from qst_tune.errors import UserError
from qst_tune.modules.loss import next_token_loss
from qst_tune.modules.model_limits import check_length


@torch.no_grad()
def visit(
    model: TransformerDecoder,
    batches: Iterable[dict[str, torch.Tensor]],
    device: torch.device,
    take: Callable[[dict[str, torch.Tensor]], None],
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


def validation_loss(
    model: TransformerDecoder,
    loss: Any,
    batches: Iterable[dict[str, torch.Tensor]],
    device: torch.device,
) -> float:
    """Mean loss in nats over every label of a dataset, on any number of devices.

    UserError if a row is longer than the model can see, or none has a label.
    """
    total = torch.zeros(2, dtype=torch.float64)

    def add(batch: dict[str, torch.Tensor]) -> None:
        check_length(batch["tokens"], model.max_seq_len)
        mean, num_labels = next_token_loss(model, loss, batch)
        count = num_labels.double().cpu()
        total.add_(torch.stack([mean.double().cpu() * count, count]))

    error = visit(model, batches, device, add)
    on_device = total.to(device if device.type == "cuda" else "cpu")
    summed, count = sum_or_fail(on_device, error).tolist()
    if not count:
        raise UserError(
            f"validation: none of its rows has a label, so nothing can be measured: {NO_LABEL}"
        )
    return float(summed / count)
