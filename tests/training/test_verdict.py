"""A run that made the model no better is reported as that; nothing is claimed without a measure."""

import pytest

from qst_tune.training.verdict import verdict

LOSS = {"name": "val_loss", "higher_is_better": False, "before": "quantised base model"}
ACCURACY = {"name": "accuracy", "higher_is_better": True, "before": "start"}


@pytest.mark.parametrize(
    ("values", "best", "settings"),
    [
        ({0: 2.0, 4: 1.5, 8: 1.9}, 4, LOSS),
        ({0: 0.5, 4: 0.8, 8: 0.6}, 4, ACCURACY),
        ({0: 2.0, 4: 1.5, 8: 2.0}, 4, LOSS),
        ({}, None, LOSS),
        ({4: 3.0}, 4, LOSS),
        ({0: 2.0}, None, LOSS),
        ({0: 2.0, 8: 3.0}, 4, LOSS),
    ],
    ids=["better", "more", "ends equal", "none", "no start", "no best", "best is lost"],
)
def test_what_is_better_or_was_not_measured_is_not_judged(values, best, settings) -> None:
    assert verdict(values, best, **settings) is None


@pytest.mark.parametrize(
    ("values", "best", "settings", "expected"),
    [
        (
            {0: 2.0, 4: 2.5, 8: 2.25},
            8,
            LOSS,
            "no validated step is better than the quantised base model: validation loss 2.2500 at "
            "step 8, 2.0000 before training",
        ),
        (
            {0: 0.75, 4: 0.75},
            4,
            ACCURACY,
            "no validated step is better than the start: accuracy 0.7500 at step 4, 0.7500 before "
            "training",
        ),
        (
            {0: 2.0, 4: 1.5, 8: 2.25},
            4,
            LOSS,
            "the run ended worse than the quantised base model: validation loss 2.2500 at step 8, "
            "2.0000 before training; the result is of step 4: 1.5000",
        ),
        (
            {0: 0.5, 4: 0.75, 8: 0.25},
            4,
            ACCURACY,
            "the run ended worse than the start: accuracy 0.2500 at step 8, 0.5000 before "
            "training; the result is of step 4: 0.7500",
        ),
    ],
)
def test_what_is_no_better_is_named_with_both_figures(values, best, settings, expected) -> None:
    assert verdict(values, best, **settings) == expected
