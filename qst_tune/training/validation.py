"""Held-out data: every batch once, in evaluation mode, and the loss on it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torchtune import utils
from torchtune.modules import TransformerDecoder

from qst_tune.errors import UserError
from qst_tune.training.data import check_length
from qst_tune.training.distributed import sum_or_fail
from qst_tune.training.loss import next_token_loss


@torch.no_grad()
def visit(
    model: TransformerDecoder,
    batches: Iterable[dict[str, torch.Tensor]],
    device: torch.device,
    take: Callable[[dict[str, torch.Tensor]], None],
) -> UserError | None:
    """Hand each batch to a function, while the model is in evaluation mode.

    Args:
        model (TransformerDecoder): in its own mode again afterwards.
        batches (Iterable[dict[str, torch.Tensor]]): this process's share.
        device (torch.device): the model's; batches are moved there.
        take (Callable[[dict[str, torch.Tensor]], None]): gets each batch.

    Returns:
        UserError | None: of a row that cannot be used, for :func:`sum_or_fail`: the other processes
        have to hear of it.
    """
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            utils.batch_to_device(batch, device)
            take(batch)
    except UserError as error:
        return error
    finally:
        model.train(was_training)
    return None


def held_out_loss(
    model: TransformerDecoder,
    loss: Any,
    batches: Iterable[dict[str, torch.Tensor]],
    device: torch.device,
) -> float:
    """Mean loss over every label of a dataset, on any number of devices.

    Args:
        model (TransformerDecoder): put into evaluation mode meanwhile.
        loss (Any): the training loss.
        batches (Iterable[dict[str, torch.Tensor]]): this process's share.
        device (torch.device): the model's.

    Returns:
        float: nats a token; NaN if there is no label.

    Raises:
        UserError: if a row is longer than the model can see.
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
    return summed / count if count else float("nan")
