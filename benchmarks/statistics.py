"""Medians and spreads of repeated measurements."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Spread:
    """Summary of repeated measurements of one number.

    Args:
        median (float): middle value.
        low (float): least value.
        high (float): greatest value.
    """

    median: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        """Write it for a table.

        Args:
            digits (int): decimal places.

        Returns:
            str: ``median (low-high)``.
        """
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    """Summarise measurements.

    Args:
        values (Sequence[float]): at least one.

    Returns:
        Spread: median, least and greatest.
    """
    return Spread(median(values), min(values), max(values))


def paired_ratio(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """Summarise ratios of measurements made side by side.

    What slows a machine down for a while slows both sides of a round, so ratios taken within a
    round vary less than the ratio of the medians would suggest.

    Args:
        values (Sequence[float]): one per round.
        reference (Sequence[float]): of the same rounds, in the same order.

    Returns:
        Spread: of ``values[i] / reference[i]``.
    """
    return spread([v / r for v, r in zip(values, reference, strict=True)])
