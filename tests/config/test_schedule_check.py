"""A schedule that wastes steps of its run is named, with the way out."""

import logging
from typing import Any

import pytest
import torch

from qst_tune.config.schedule_check import check_schedule, learning_rates, report_schedule
from qst_tune.config.training_check import _try_schedule
from qst_tune.errors import UserError
from tests.support.configs import typed_config

TORCHTUNE = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
OWN = "qst_tune.training.lr_schedulers.cosine_with_warmup"


def config(component: str, settings=None, /, **scheduler):
    return typed_config(
        {
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-4},
            "lr_scheduler": {"_component_": component, **scheduler},
            **(settings or {}),
        }
    )


def test_warm_up_longer_than_the_run_is_named_with_both_numbers() -> None:
    first, second = check_schedule(config(TORCHTUNE, num_warmup_steps=100), 4)
    assert first == (
        "lr_scheduler: num_warmup_steps=100, and the run has 4 steps: its learning rate rises up "
        f"to step 4, to 6e-06 of optimizer.lr=0.0002; use lr_scheduler._component_={OWN}, whose "
        "warm-up is a share of the run"
    )
    assert "gives step 1 of 4 a learning rate of 0, so it learns nothing" in second
    (own,) = check_schedule(config(OWN, num_warmup_steps=100), 4)
    assert own == (
        "lr_scheduler: num_warmup_steps=100, and the run has 4 steps: the warm-up is shortened to 2"
    )


@pytest.mark.parametrize(
    ("num_warmup_steps", "count"), [(0, 0), (1, 1), (5, 1), (6, 2), (9, 2), (10, 2)]
)
def test_more_than_half_of_the_run_is_too_long(num_warmup_steps: int, count: int) -> None:
    warnings = check_schedule(config(TORCHTUNE, num_warmup_steps=num_warmup_steps), 10)
    assert len(warnings) == count


def test_run_in_which_every_rate_is_zero_is_refused() -> None:
    with pytest.raises(UserError, match=r"gives each of the run's 1 steps a learning rate of 0"):
        check_schedule(config(TORCHTUNE, num_warmup_steps=1), 1)
    assert check_schedule(config(OWN), 1) == []


@pytest.mark.parametrize("schedule", [None, {"_component_": OWN}])
def test_rate_of_zero_is_refused(schedule) -> None:
    cfg = config(OWN, {"lr_scheduler": schedule})
    cfg.optimizer.lr = 0.0
    with pytest.raises(UserError, match=r"^optimizer: lr=0 changes nothing in any step"):
        check_schedule(cfg, 4)


def test_what_is_not_looked_at_is_not_warned_of() -> None:
    assert check_schedule(config(OWN, {"lr_scheduler": None}), 4) == []
    assert check_schedule(config(TORCHTUNE, num_warmup_steps=10**6), 10**5) == []


def test_rates_are_those_that_the_run_will_have() -> None:
    full, rates = learning_rates(config(TORCHTUNE, num_warmup_steps=2), 4)
    assert (full, rates) == (2e-4, pytest.approx([0, 1e-4, 2e-4, 1e-4]))


def test_warnings_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    cfg = config(TORCHTUNE, {"epochs": 1}, num_warmup_steps=100)
    report_schedule(cfg, 4)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3


@pytest.mark.parametrize(
    ("changes", "num_steps", "told"),
    [
        ({}, 1, "the run has 1 optimizer step, too few to learn much: set epochs=20 or more"),
        ({"epochs": 3}, 12, "the run has 12 optimizer steps, too few to learn much: set epochs=5"),
        ({}, 20, ""),
        ({"max_steps_per_epoch": 2}, 2, ""),
    ],
)
def test_run_of_a_few_steps_is_named_unless_it_is_asked_for(
    changes, num_steps: int, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(OWN, {"epochs": 1, **changes})
    with caplog.at_level(logging.WARNING):
        report_schedule(cfg, num_steps)
    assert ("too few" in caplog.text) == bool(told)
    assert told in caplog.text


def times(optimizer: torch.optim.Optimizer, *, factor: float, **_: object) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor)


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_negative_and_infinite_rates_are_refused(factor: float) -> None:
    cfg = config(f"{__name__}.times", factor=factor)
    with pytest.raises(UserError, match=r"lr_scheduler: step 1 of 10 has the learning rate"):
        _try_schedule(cfg)
