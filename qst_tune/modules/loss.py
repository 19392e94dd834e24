"""Losses: cross entropy through a frozen LM head that never holds the logits, or torchtune's.

Notation: N tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torchtune.modules import TiedLinear, TransformerDecoder
from torchtune.modules.loss import CEWithChunkedOutputLoss


def connect_loss(loss: Any, model: TransformerDecoder) -> None:
    """Make the model return, in place, what the loss takes: the head's input or logits."""
    if hasattr(loss, "set_model_output"):
        loss.set_model_output(model)
    elif isinstance(loss, CEWithChunkedOutputLoss):
        model.set_num_output_chunks(loss.num_output_chunks)


def next_token_loss(
    model: nn.Module, loss: Any, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the mean loss of predicting each next token, and the int64 number of labels in it.

    The batch has ``tokens`` and aligned ``labels``, both ``[B, T]``, perhaps ``mask`` and
    ``input_pos``; the model is connected by :func:`connect_loss`.
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


def zero_loss(output: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Return zero, fp32, with a gradient of zeros for everything that ``output`` depends on."""
    chunks = [output] if isinstance(output, torch.Tensor) else output
    return torch.stack([chunk.float().sum() * 0 for chunk in chunks]).sum()


Head = Callable[[torch.Tensor], torch.Tensor]


class LinearCrossEntropyLoss(nn.Module):
    r"""Mean cross entropy of a frozen LM head's logits, computed from the head's input.

    .. math::
        \frac{1}{n} \sum_{i:\, t_i \neq \text{ignore}}
        -\log \mathrm{softmax}(\mathrm{head}(y_i))_{t_i}

    The head is frozen, so all that backward needs is the gradient of its input y, ``[N, D]``. It is
    computed in the forward pass, a chunk of tokens at a time: the full ``[N, V]`` logits (16 GiB in
    fp32 for 32k tokens and a vocabulary of 128k) never exist. A chunk needs ``6 chunk_tokens V``
    bytes in bf16. Tokens with the label ``ignore_index`` are dropped before the head.

    It takes the place of torchtune's losses in a config. As newer torchtune versions do it, the
    recipe calls :meth:`set_model_output`, after which the model returns the head's input.
    """

    def __init__(self, chunk_tokens: int = 256, ignore_index: int = -100) -> None:
        super().__init__()
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")
        self.chunk_tokens = chunk_tokens
        self.ignore_index = ignore_index
        self._head: Head | None = None

    def set_model_output(self, model: TransformerDecoder) -> None:
        """Take over the model's LM head; from now on the model returns the head's input."""
        model.skip_output_layer = True
        # Not a submodule: the head stays the model's, in one place in its state dict.
        object.__setattr__(self, "_head", model.output)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the loss: fp32 scalar, the mean over tokens with a label; 0 if there is none.

        ``hidden`` is the head's input y, ``[..., D]``; ``labels`` are aligned token ids ``[...]``.
        """
        if self._head is None:
            raise RuntimeError("LinearCrossEntropyLoss: call set_model_output(model) first")
        kept = labels != self.ignore_index
        losses = linear_cross_entropy(hidden[kept], labels[kept], self._head, self.chunk_tokens)
        return losses.sum() / kept.sum().clamp(min=1)


def linear_cross_entropy(
    hidden: torch.Tensor, labels: torch.Tensor, head: Head, chunk_tokens: int = 256
) -> torch.Tensor:
    r"""Compute :math:`-\log \mathrm{softmax}(\mathrm{head}(y_i))_{t_i}` of each token, in nats.

    ``hidden`` is y, ``[N, D]``; ``labels`` t, int64 ``[N]``; the frozen ``head`` maps ``[n, D]`` to
    logits ``[n, V]``. The result is fp32 ``[N]``, differentiable in ``hidden``.
    """
    losses: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, labels, head, chunk_tokens
    )
    return losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    """A cross entropy for each token; the gradient of ``hidden`` is ready when forward returns."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Head, chunk_tokens: int
    ) -> torch.Tensor:
        chunk_loss = _loss_of_any_head if _plain_weight(head) is None else _loss_of_linear_head
        needs_grad = hidden.requires_grad
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if needs_grad else None
        for start in range(0, len(labels), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            losses[chunk], chunk_grad = chunk_loss(hidden[chunk], labels[chunk], head, needs_grad)
            if grad is not None and chunk_grad is not None:
                grad[chunk] = chunk_grad
        ctx.grad = grad
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.grad * grad_losses[:, None].to(ctx.grad.dtype), None, None, None


def _plain_weight(head: Head) -> torch.Tensor | None:
    """``[V, D]`` weight of a head that is one matrix product; None for any other head."""
    if isinstance(head, TiedLinear):
        weight: torch.Tensor = head.tied_module.weight
        return weight
    # A sharded table is a parametrised weight, which gives its module a type of its own.
    if isinstance(head, nn.Linear) and type_before_parametrizations(head) is nn.Linear:
        return head.weight if head.bias is None else None
    return None


def _loss_of_linear_head(
    hidden: torch.Tensor, labels: torch.Tensor, head: Head, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses ``[n]`` and gradient of ``hidden`` by hand, with one fp32 buffer ``[n, V]``.

    A ``QuantizedTable`` takes part in both products without ever being dense.
    """
    weight = _plain_weight(head)
    assert weight is not None
    target = labels.unsqueeze(-1)
    shifted = F.linear(hidden, weight).float()
    shifted -= shifted.amax(-1, keepdim=True)
    target_logit = shifted.gather(-1, target)
    exp = shifted.exp_()
    sum_exp = exp.sum(-1, keepdim=True)
    loss = (sum_exp.log() - target_logit).squeeze(-1)
    if not needs_grad:
        return loss, None
    probabilities = exp.div_(sum_exp)
    probabilities.scatter_add_(-1, target, torch.full_like(target_logit, -1.0))
    return loss, probabilities.to(weight.dtype) @ weight


def _loss_of_any_head(
    hidden: torch.Tensor, labels: torch.Tensor, head: Head, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses and gradient by autograd, for heads that are more than a product."""
    with torch.set_grad_enabled(needs_grad):
        leaf = hidden.detach().requires_grad_(needs_grad)
        loss = F.cross_entropy(head(leaf).float(), labels, reduction="none")
        grad = torch.autograd.grad(loss.sum(), leaf)[0] if needs_grad else None
    return loss.detach(), grad
