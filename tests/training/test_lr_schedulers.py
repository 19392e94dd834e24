"""Every step learns, whatever the length of the run."""

import math

import pytest
import torch
from torch import nn

from qst_tune.training.lr_schedulers import cosine_with_warmup


def rates(num_steps: int, **settings) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = cosine_with_warmup(optimizer, num_training_steps=num_steps, **settings)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12), "the end of the cosine"
    return found


def test_rates_are_those_of_the_formula() -> None:
    expected = [2 * t / 4 for t in (1, 2, 3)]
    expected += [1 + math.cos(math.pi * (t - 4) / 7) for t in range(4, 11)]
    assert rates(10, warmup_ratio=0.3) == pytest.approx(expected, rel=1e-12)
    assert rates(10, num_warmup_steps=3) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("settings", [{}, {"warmup_ratio": 0.99}, {"num_warmup_steps": 100}])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 50])
def test_no_rate_is_zero_and_the_full_one_is_reached(num_steps: int, settings) -> None:
    found = rates(num_steps, **settings)
    assert min(found) > 0
    assert max(found) == 2.0
    if "num_warmup_steps" in settings:
        assert found.index(2.0) == num_steps // 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_ratio": 1.0}, r"warmup_ratio=1.0 must be at least 0 and below 1"),
        ({"warmup_ratio": -0.1}, r"warmup_ratio=-0.1 must be"),
        ({"num_warmup_steps": -1}, r"num_warmup_steps=-1 must be at least 0"),
    ],
)
def test_what_is_no_share_is_refused(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rates(4, **settings)
