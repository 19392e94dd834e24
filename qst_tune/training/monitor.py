"""The figure of validation that decides which step, and which trial, is the best."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Monitor:
    """A figure of validation by its name, and which of its values are good."""

    name: str
    higher_is_better: bool = False

    def rank(self, value: float | None) -> float:
        """Return a key to sort by, the best first; None and what is not finite come last."""
        if value is None or not math.isfinite(value):
            return math.inf
        return -value if self.higher_is_better else value

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether a value is better than another; nothing is better than its equal."""
        return self.rank(value) < self.rank(than)
