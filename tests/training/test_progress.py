"""Where a run stands, and the random numbers of its steps."""

import random
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from qst_tune.training import progress
from qst_tune.training.monitor import Monitor
from qst_tune.training.progress import Progress, seed_step


def draws(seed: int, step: int) -> tuple[Any, ...]:
    seed_step(seed, step)
    return torch.rand(4).tolist(), np.random.rand(), random.random()


def test_random_numbers_are_a_function_of_seed_and_step() -> None:
    assert draws(7, 3) == draws(7, 3)
    assert len({repr(draws(seed, step)) for step in range(50) for seed in range(2)}) == 100


def test_processes_draw_different_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = draws(7, 3)
    monkeypatch.setattr(progress, "rank_and_world_size", lambda: (1, 2))
    assert draws(7, 3) != alone


@pytest.mark.parametrize(
    ("values", "higher_is_better", "best_step", "since"),
    [
        ([3.0, 2.0, 2.5, 2.0], False, 2, 2),
        ([3.0, 2.0, 2.5, 4.0], True, 4, 0),
        ([1.0, float("nan"), float("inf")], False, 1, 2),
        ([float("nan"), 5.0], False, 2, 0),
        ([float("inf"), 5.0], False, 2, 0),
    ],
)
def test_best_step_is_the_first_with_the_best_figure(
    values: list[float], higher_is_better: bool, best_step: int, since: int
) -> None:
    progress = Progress()
    for step, value in enumerate(values, start=1):
        progress.step = step
        is_best = progress.record(value, Monitor("figure", higher_is_better))
        assert is_best == (progress.best_step == step)
    assert (progress.best_step, progress.validations_since_best) == (best_step, since)
    assert Progress.from_dict({**asdict(progress), "of a later version": 1}) == progress
