"""A step takes as many rows as the config says, or as a small dataset has."""

import pytest

from qst_tune.data.batches.schedule import describe_step, fit_step
from tests.support.configs import typed_config

CONFIG = typed_config({"batch_size": 4, "gradient_accumulation_steps": 4})


@pytest.mark.parametrize(
    ("num_rows", "step"),
    [
        (1, (1, 1)),
        (4, (4, 1)),
        (5, (2, 2)),
        (7, (3, 2)),
        (10, (3, 3)),
        (15, (3, 4)),
        (16, (4, 4)),
        (99, (4, 4)),
    ],
)
def test_step_fits_a_small_dataset(num_rows: int, step: tuple[int, int]) -> None:
    assert fit_step(CONFIG, num_rows) == step


@pytest.mark.parametrize("num_rows", range(1, 40))
def test_a_fitted_step_leaves_out_fewer_rows_than_it_has_batches(num_rows: int) -> None:
    batch_size, num_batches = fit_step(CONFIG, num_rows)
    assert 1 <= batch_size <= 4
    if num_rows < 16:
        assert 0 <= num_rows - batch_size * num_batches < num_batches


def test_what_is_left_out_is_described() -> None:
    assert describe_step(CONFIG, 32) is None
    assert describe_step(CONFIG, 35) == (
        "dataset: a step has 16 of 35 rows; each epoch leaves out 3, drawn anew"
    )
    assert describe_step(CONFIG, 5) == (
        "dataset: 5 rows are fewer than the 16 of a step (batch_size=4 x "
        "gradient_accumulation_steps x processes): a step has 4, as 2 x 2; "
        "each epoch leaves out 1, drawn anew"
    )
