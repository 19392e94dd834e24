"""The largest batch whose training step fits into a given memory."""

from collections.abc import Callable
from dataclasses import dataclass

_MAX_TRIALS = 3


@dataclass(frozen=True)
class LargestBatch:
    """Answer to "which batch fits?".

    Args:
        batch_size (int): rows; 0 if not even one fits.
        is_verified (bool): True if a step of this size was estimated, False if it was only
            extrapolated from smaller ones.
    """

    batch_size: int
    is_verified: bool

    def __str__(self) -> str:
        return f"{'' if self.is_verified else 'about '}{self.batch_size or 'none'}"


def largest_batch(
    peak_bytes: Callable[[int], int], limit_bytes: float, *, start: int, max_trial: int
) -> LargestBatch:
    """Find the largest batch size; memory is nearly affine in it, so few trials are needed.

    Args:
        peak_bytes (Callable[[int], int]): peak of a step with a given number of rows; takes a time
            that grows with it.
        limit_bytes (float): what the peak may be at most.
        start (int): a batch size to begin with.
        max_trial (int): largest batch size to try; larger ones are extrapolated.

    Returns:
        LargestBatch: where memory is not quite affine it may not be the very largest.
    """
    known = {batch: peak_bytes(batch) for batch in (start, 2 * start)}
    for _ in range(_MAX_TRIALS):
        guess = _extrapolate(known, limit_bytes)
        if guess > max(max_trial, *known):
            return LargestBatch(guess, is_verified=False)
        if guess in known or guess < 1:
            break
        known[guess] = peak_bytes(guess)
    fitting = [batch for batch, peak in known.items() if peak <= limit_bytes]
    return LargestBatch(max(fitting, default=0), is_verified=True)


def _extrapolate(known: dict[int, int], limit_bytes: float) -> int:
    """Where the line through the two points nearest to the limit meets it."""
    nearest = sorted(known, key=lambda batch: abs(known[batch] - limit_bytes))[:2]
    low, high = sorted(nearest)
    slope = (known[high] - known[low]) / (high - low)
    return low + int((limit_bytes - known[low]) // slope) if slope > 0 else high
