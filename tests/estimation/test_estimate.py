"""The answer of few trials is that of trying every batch size."""

import itertools
from collections.abc import Callable

import pytest

from qst_tune.estimation.estimate import largest_batch


def exhaustive(peak: Callable[[int], float], limit: float) -> int:
    return next(batch for batch in itertools.count() if peak(batch + 1) > limit)


def affine(batch: int) -> int:
    return 100 + 10 * batch


def bent(batch: int) -> int:
    return max(500, 300 + 5 * batch, 20 * batch - 100, 60 * batch - 3000)


def curved(batch: int) -> int:
    return 100 + batch * batch


def chunked(batch: int) -> int:
    """A chunk that grows until it is full."""
    return 100 + 50 * min(batch, 9) + 7 * batch


@pytest.mark.parametrize("peak", [affine, bent, curved, chunked])
@pytest.mark.parametrize("start", [1, 3, 4, 16, 60])
@pytest.mark.parametrize("fixed", [0, 90, 100])
@pytest.mark.parametrize("step", [1, 8])
def test_answer_is_that_of_trying_every_batch_size(
    peak: Callable[[int], int], start: int, fixed: int, step: int
) -> None:
    for limit in (101, 105, 111, 150, 499, 500, 501, 777, 1000, 1009, 1010, 2999, 5000):
        answer = largest_batch(peak, limit, start=start, fixed_bytes=fixed, step=step)
        assert answer == exhaustive(peak, limit), (limit, start)


@pytest.mark.parametrize(("peak", "most"), [(affine, 3), (chunked, 5), (bent, 10)])
@pytest.mark.parametrize("limit", [700, 1000, 1200, 30_000])
def test_few_batch_sizes_are_tried(peak: Callable[[int], int], most: int, limit: int) -> None:
    tried: list[int] = []
    largest_batch(lambda b: tried.append(b) or peak(b), limit, start=4, fixed_bytes=100)
    assert len(tried) == len(set(tried)) <= most


def test_nothing_fits() -> None:
    assert largest_batch(affine, 105, start=4) == 0
