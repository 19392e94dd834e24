"""The largest batch whose training step fits into a given memory."""

from collections.abc import Callable
from dataclasses import dataclass, field


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


@dataclass
class _Search:
    """Peaks by batch size, each estimated once. A row more never takes less memory."""

    peak_bytes: Callable[[int], int]
    limit: float
    known: dict[int, int] = field(default_factory=dict)

    def fits(self, batch: int) -> bool:
        if batch not in self.known:
            self.known[batch] = self.peak_bytes(batch)
        return self.known[batch] <= self.limit

    def crossing(self, first: int, second: int) -> int:
        """Largest batch size at which the line through two known ones is within the limit."""
        slope = (self.known[second] - self.known[first]) / (second - first)
        if slope <= 0:  # something else than the rows is the peak
            return 2 * second
        return first + int((self.limit - self.known[first]) / slope)

    def between(self, low: int, high: int) -> int:
        """The answer, between a batch size that fits and one that does not, both known."""
        width = 2 * (high - low)
        while high - low > 1:
            guess = min(max(self.crossing(low, high), low + 1), high - 1)
            if high - low > width / 2:  # where memory bends, lines lead on slowly
                guess = (low + high) // 2
            width = high - low
            low, high = (guess, high) if self.fits(guess) else (low, guess)
        return low


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
        LargestBatch: the same as of trying every batch size, except where it is extrapolated.
    """
    search = _Search(peak_bytes, limit_bytes)
    if not search.fits(start):
        low = 1 if start > 1 and search.fits(1) else 0
        return LargestBatch(search.between(low, start) if low else 0, is_verified=True)
    low, high = start, 2 * start
    while search.fits(high):
        guess = search.crossing(low, high)
        if guess > max(max_trial, high):
            return LargestBatch(guess, is_verified=False)
        low, high = high, max(guess, high + 1)
    return LargestBatch(search.between(low, high), is_verified=True)
