"""Losses for configs of tests that go wrong in one chosen call, and only if no marker file says
that they have already: the run that resumes has the same config.
"""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn


class _FaultyLoss(nn.CrossEntropyLoss):
    def __init__(self, call: int, marker: str) -> None:
        super().__init__()
        self.call, self.marker, self.count = call, Path(marker), 0

    def is_due(self) -> bool:
        self.count += 1
        if self.count != self.call or self.marker.exists():
            return False
        self.marker.touch()
        return True


class PoisonedLoss(_FaultyLoss):
    """Once not finite."""

    def __init__(self, call: int, marker: str, value: str) -> None:
        super().__init__(call, marker)
        self.value = float(value)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = super().forward(logits, labels)
        return loss * self.value if self.is_due() else loss


class PoisonedGradient(_FaultyLoss):
    """Once a finite loss with a gradient that is not."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = super().forward(logits, labels)
        if self.is_due():
            loss = loss + (logits.sum() * 0).abs().sqrt()  # the root's slope at 0 is infinite
        return loss


class SignalledLoss(_FaultyLoss):
    """Sends this process a signal, as a person or a scheduler would."""

    def __init__(self, call: int, marker: str, signal_name: str) -> None:
        super().__init__(call, marker)
        self.signal = signal.Signals[signal_name]

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.is_due():
            os.kill(os.getpid(), self.signal)
        return super().forward(logits, labels)


class FadingRows:
    """Eight rows, one of which can be read once only; no memory keeps them, since they are tuples.

    Args:
        tokenizer (Any): not used.
        bad (int): that row.
    """

    def __init__(self, tokenizer: Any, *, bad: int) -> None:
        self.bad = bad
        self.num_reads = 0

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, tuple[int, ...]]:
        self.num_reads += index == self.bad
        if index == self.bad and self.num_reads > 1:
            raise KeyError("input")
        tokens = tuple(range(10, 20 + index))
        return {"tokens": tokens, "labels": tokens}
