"""Connect a loss of the config to the model, whichever of torchtune's three kinds it is."""

from typing import Any

import torch
from torch import nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.loss import CEWithChunkedOutputLoss


def connect_loss(loss: Any, model: TransformerDecoder) -> None:
    """Make the model return what the loss takes, in place.

    A loss with ``set_model_output`` gets the LM head's input, torchtune's chunked loss gets chunks
    of logits, any other gets the logits.
    """
    if hasattr(loss, "set_model_output"):
        loss.set_model_output(model)
    elif isinstance(loss, CEWithChunkedOutputLoss):
        model.set_num_output_chunks(loss.num_output_chunks)


def next_token_loss(
    model: nn.Module, loss: Any, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the mean loss of predicting each next token, and the int64 number of labels in it.

    ``tokens`` and ``labels`` of the batch are ``[B, T]``, aligned
    (:mod:`~qst_tune.data.labels`), perhaps with ``mask`` and ``input_pos``; the model is
    connected by :func:`connect_loss`.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    output = model(**inputs)
    num_labels = (labels != loss.ignore_index).sum()
    takes_tokens = hasattr(loss, "set_model_output") or isinstance(output, list)
    if not takes_tokens:
        output, labels = output.flatten(0, 1), labels.flatten()
    if not num_labels:  # torch's and torchtune's losses divide by it: NaN, also in the gradient
        return zero_loss(output), num_labels
    return loss(output, labels), num_labels


def zero_loss(output: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """Return zero, fp32, with a gradient of zeros for everything that ``output`` depends on."""
    chunks = output if isinstance(output, list) else [output]
    return torch.stack([chunk.float().sum() * 0 for chunk in chunks]).sum()
