"""Which of two figures of validation is the better one."""

import math

import pytest

from qst_tune.training.monitor import Monitor

LOSS, ACCURACY = Monitor("val_loss"), Monitor("accuracy", higher_is_better=True)


@pytest.mark.parametrize(("monitor", "best"), [(LOSS, -1.0), (ACCURACY, 3.0)])
def test_values_are_ranked_from_the_best_to_those_that_are_not_finite(
    monitor: Monitor, best: float
) -> None:
    values = [2.0, math.nan, 3.0, None, -1.0]
    assert min(values, key=monitor.rank) == best
    assert sorted(map(monitor.rank, values))[-2:] == [math.inf, math.inf]


@pytest.mark.parametrize(
    ("value", "than", "less_is_better", "more_is_better"),
    [
        (1.0, 2.0, True, False),
        (2.0, 1.0, False, True),
        (1.0, 1.0, False, False),
        (1.0, None, True, True),
        (1.0, math.nan, True, True),
        (math.nan, 1.0, False, False),
        (math.nan, None, False, False),
        (math.inf, None, False, False),
        (math.inf, 1.0, False, False),
        (-math.inf, 1.0, False, False),
    ],
)
def test_only_a_finite_value_is_better(
    value: float, than: float | None, less_is_better: bool, more_is_better: bool
) -> None:
    found = (LOSS.is_better(value, than), ACCURACY.is_better(value, than))
    assert found == (less_is_better, more_is_better)
