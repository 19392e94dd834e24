"""Losses: cross entropy through a frozen LM head that never holds the logits, or torchtune's.

Notation: N tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torchtune.modules import TiedLinear, TransformerDecoder
from torchtune.modules.loss import CEWithChunkedOutputLoss

from qst_tune.modules import fused_layers
from qst_tune.modules.scaled_head import ScaledHead

_CHUNK_TOKENS = 256
_FUSED_CHUNK_BYTES = 128 * 2**20


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
    num_labels = (labels != loss.ignore_index).sum()
    # Read before the model runs: a GPU that is waited for later has nothing to do meanwhile.
    known = num_labels.item()
    output = model(**inputs)
    takes_tokens = hasattr(loss, "set_model_output") or isinstance(output, list)
    if not takes_tokens:
        output, labels = output.flatten(0, 1), labels.flatten()
    if not known:  # torch's and torchtune's losses divide by it: NaN, also in the gradient
        return zero_loss(output), num_labels
    if isinstance(loss, LinearCrossEntropyLoss):
        return loss(output, labels, int(known)), num_labels
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
    bytes in bf16, ``2 chunk_tokens V`` in a Triton kernel (``triton_kernels.py``). Tokens with
    the label ``ignore_index`` are dropped before the head. ``chunk_tokens`` None: 256, and of that
    kernel as many as fit in 128 MiB.

    It takes the place of torchtune's losses in a config. As newer torchtune versions do it, the
    recipe calls :meth:`set_model_output`, after which the model returns the head's input.
    """

    def __init__(self, chunk_tokens: int | None = None, ignore_index: int = -100) -> None:
        super().__init__()
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")
        self.chunk_tokens = chunk_tokens
        self.ignore_index = ignore_index
        self._head: Head | None = None

    def set_model_output(self, model: TransformerDecoder) -> None:
        """Take over the model's LM head; from now on the model returns the head's input."""
        model.skip_output_layer = True
        # Not a submodule: the head stays the model's, in one place in its state dict.
        object.__setattr__(self, "_head", model.output)

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor, num_labels: int | None = None
    ) -> torch.Tensor:
        """Compute the loss: fp32 scalar, the mean over tokens with a label; 0 if there is none.

        ``hidden`` is the head's input y, ``[..., D]``; ``labels`` are aligned token ids ``[...]``.
        ``num_labels`` is how many of them count, if known: a GPU is not waited for then.
        """
        if self._head is None:
            raise RuntimeError("LinearCrossEntropyLoss: call set_model_output(model) first")
        labels = labels.flatten()
        kept = labels != self.ignore_index
        rows = rows_with_label(kept, num_labels)
        losses = linear_cross_entropy(
            hidden.flatten(0, -2), labels, self._head, self.chunk_tokens, rows
        )
        return losses.sum() / kept.sum().clamp(min=1)


def rows_with_label(kept: torch.Tensor, num_kept: int | None) -> torch.Tensor | None:
    """Return the indices of the ``num_kept`` that ``kept``, ``[N]``, is true of; None: all N."""
    if num_kept is None:
        num_kept = int(kept.sum())
    return None if num_kept == len(kept) else torch.nonzero_static(kept, size=num_kept).squeeze(-1)


def linear_cross_entropy(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Head,
    chunk_tokens: int | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Compute :math:`-\log \mathrm{softmax}(\mathrm{head}(y_i))_{t_i}` of each token, in nats.

    ``hidden`` is y, ``[N, D]``; ``labels`` t, int64 ``[N]``; the frozen ``head`` maps ``[n, D]`` to
    logits ``[n, V]``. ``rows``, int64 ``[M]``, are the tokens that count; None: all. The result is
    fp32 ``[M]``, differentiable in ``hidden``, once.
    """
    losses: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden if torch.is_grad_enabled() else hidden.detach(),
        labels,
        head,
        chunk_tokens or _chunk_tokens(hidden, head),
        rows,
    )
    return losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    """A cross entropy for each token; the gradient of ``hidden`` is ready when forward returns."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        head: Head,
        chunk_tokens: int,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        needs_grad = hidden.requires_grad
        num_tokens = len(labels) if rows is None else len(rows)
        losses = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)
        make = torch.empty_like if rows is None else torch.zeros_like
        grad = make(hidden) if needs_grad else None
        for start in range(0, num_tokens, chunk_tokens):
            part = slice(start, start + chunk_tokens)
            chunk = part if rows is None else rows[part]
            losses[part], chunk_grad = _chunk_loss(hidden[chunk], labels[chunk], head, needs_grad)
            if grad is not None and chunk_grad is not None:
                grad[chunk] = chunk_grad
        ctx.grad, ctx.rows = grad, rows
        return losses

    @staticmethod
    def backward(
        ctx: Any, grad_losses: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None]:
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            raise RuntimeError("linear_cross_entropy: backward runs once; its gradient is used up")
        factors = grad_losses
        if ctx.rows is not None:
            factors = grad_losses.new_zeros(len(grad)).index_copy_(0, ctx.rows, grad_losses)
        return grad.mul_(factors[:, None].to(grad.dtype)), None, None, None, None


class _Product(NamedTuple):
    """A head that is one matrix product with ``[V, D]``, scaled and capped behind it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float = 1.0
    cap: float | None = None


def _product_of(head: Head) -> _Product | None:
    """Return what such a head multiplies with; None for any other head."""
    if isinstance(head, ScaledHead):
        inner = _product_of(head.linear)
        return inner and inner._replace(scale=head.scale, cap=head.cap)
    if isinstance(head, TiedLinear):
        return _Product(head.tied_module.weight, None)
    # A sharded table is a parametrised weight, which gives its module a type of its own.
    if isinstance(head, nn.Linear) and type_before_parametrizations(head) is nn.Linear:
        return _Product(head.weight, head.bias)
    return None


def _chunk_tokens(hidden: torch.Tensor, head: Head) -> int:
    """How many tokens go through the head at once."""
    product = _product_of(head) if fused_layers.runs_fused(hidden) else None
    if product is None:
        return _CHUNK_TOKENS
    row_bytes = len(product.weight) * hidden.element_size()
    return max(_CHUNK_TOKENS, _FUSED_CHUNK_BYTES // row_bytes // 256 * 256)


def _chunk_loss(
    hidden: torch.Tensor, labels: torch.Tensor, head: Head, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses ``[n]`` and gradient of ``hidden``, by the fastest way for this head and device."""
    product = _product_of(head)
    if product is not None and fused_layers.runs_fused(hidden):
        return _fused_loss(hidden, labels, product, needs_grad)
    if product is not None and product[1:] == (None, 1.0, None):
        return _loss_of_product(hidden, labels, product.weight, needs_grad)
    return _loss_of_any_head(hidden, labels, head, needs_grad)


def _fused_loss(
    hidden: torch.Tensor, labels: torch.Tensor, product: _Product, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """By a kernel that puts the gradient of the logits in their place."""
    weight, bias, scale, cap = product
    logits = F.linear(hidden, weight, bias)
    loss = fused_layers.fused_kernels().cross_entropy_(
        logits, labels, scale=scale, cap=cap, needs_grad=needs_grad
    )
    return loss, logits @ weight if needs_grad else None


def _loss_of_product(
    hidden: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """By hand, with one fp32 buffer ``[n, V]``.

    A ``QuantizedTable`` takes part in both products without ever being dense.
    """
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
    """By autograd, for heads that are more than a product."""
    with torch.set_grad_enabled(needs_grad):
        leaf = hidden.detach().requires_grad_(needs_grad)
        loss = F.cross_entropy(head(leaf).float(), labels, reduction="none")
        grad = torch.autograd.grad(loss.sum(), leaf)[0] if needs_grad else None
    return loss.detach(), grad
