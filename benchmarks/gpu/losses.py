"""Section ``loss``: the cross entropy of a frozen LM head, forward and backward."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.bench import Bench, Row, Run
from qst_tune.modules import LinearCrossEntropyLoss

OURS, LIGER = "LinearCrossEntropyLoss", "liger-kernel"
FLOOR = "its two products alone"
LOSSES = (OURS, LIGER, FLOOR)


def loss(bench: Bench) -> Iterator[Row]:
    """Measure our loss and Liger's, beside the time of the two products of a head."""
    num_tokens, width = bench.sizes.loss_tokens, bench.sizes.backbone.embed_dim
    for vocabulary in bench.sizes.vocabularies:
        weight = bench.weights.dense(torch.Size((vocabulary, width)))
        hidden = bench.weights.dense(torch.Size((num_tokens, width))).requires_grad_()
        labels = torch.randint(vocabulary, (num_tokens,), device=bench.device)
        shape = f"{num_tokens} tokens, V = {vocabulary}"
        makers = {
            OURS: partial(_ours, weight, hidden, labels),
            LIGER: partial(_liger, weight, hidden, labels),
        }
        yield from bench.kernels("loss", shape, makers)
        yield {
            "section": "loss",
            "method": FLOOR,
            "shape": shape,
            "ms": round(4 * num_tokens * width * vocabulary / bench.tflops / 1e9, 4),
        }


def _ours(weight: torch.Tensor, hidden: torch.Tensor, labels: torch.Tensor) -> Run:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    loss = LinearCrossEntropyLoss()
    model: Any = nn.Module()
    model.output = head
    loss.set_model_output(model)

    def run() -> None:
        loss(hidden[None], labels[None]).backward()
        hidden.grad = None

    return run


def _liger(weight: torch.Tensor, hidden: torch.Tensor, labels: torch.Tensor) -> Run:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()

    def run() -> None:
        loss(weight, hidden, labels).backward()
        hidden.grad = None

    return run
