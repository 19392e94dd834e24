"""The largest batch whose training step fits into a given memory."""

from collections.abc import Callable

_MAX_TRIALS = 4


def largest_batch(peak_bytes: Callable[[int], int], limit_bytes: float, start: int) -> int:
    """Find the largest batch size; memory is nearly affine in it, so few trials are needed.

    Args:
        peak_bytes (Callable[[int], int]): peak of a step with a given number of rows; expensive.
        limit_bytes (float): what the peak may be at most.
        start (int): a batch size to begin with.

    Returns:
        int: 0 if not even one row fits; a batch size that was tried and fits otherwise. Where
            memory is not affine it may not be the very largest.
    """
    known = {batch: peak_bytes(batch) for batch in {1, max(2, start)}}
    for _ in range(_MAX_TRIALS):
        guess = max(1, _extrapolate(known, limit_bytes))
        if guess in known:
            break
        known[guess] = peak_bytes(guess)
    return max((batch for batch, peak in known.items() if peak <= limit_bytes), default=0)


def _extrapolate(known: dict[int, int], limit_bytes: float) -> int:
    """Where the line through the two points nearest to the limit meets it."""
    nearest = sorted(known, key=lambda batch: abs(known[batch] - limit_bytes))[:2]
    low, high = sorted(nearest)
    slope = (known[high] - known[low]) / (high - low)
    if slope <= 0:
        return high
    return low + int((limit_bytes - known[low]) // slope)
