"""The largest batch whose training step fits into a given memory."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class _Search:
    """Peaks by batch size, each estimated once. One more row never takes less memory."""

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
    peak_bytes: Callable[[int], int],
    limit_bytes: float,
    *,
    start: int,
    fixed_bytes: int = 0,
    step: int = 1,
) -> int:
    """Find the largest batch size; memory is nearly affine in it, so few trials are needed.

    Args:
        peak_bytes (Callable[[int], int]): peak of a step with a given number of rows.
        limit_bytes (float): the highest peak that is allowed.
        start (int): a batch size to begin with.
        fixed_bytes (int): about what no row adds to, such as the weights.
        step (int): its multiples are tried first, for a ``peak_bytes`` that is quick for them.

    Returns:
        int: rows, the same as of trying every batch size; 0 if not even one fits.
    """
    search = _Search(peak_bytes, limit_bytes)
    if step > 1:
        known = {"start": max(1, start // step), "fixed_bytes": fixed_bytes}
        full = step * largest_batch(lambda n: peak_bytes(n * step), limit_bytes, **known)
        if full and search.fits(full) and not search.fits(full + step):
            return search.between(full, full + step)
        start = min(start, step)
    if not search.fits(start):
        low = 1 if start > 1 and search.fits(1) else 0
        return search.between(low, start) if low else 0
    a_row = max(1.0, (search.known[start] - fixed_bytes) / start)
    low, high = start, start + max(1, int((limit_bytes - search.known[start]) / a_row))
    while search.fits(high):
        low, high = high, max(search.crossing(low, high), high + 1)
    return search.between(low, high)
