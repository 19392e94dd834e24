"""Which runs the key ``trials`` names."""

import math

import pytest
from omegaconf import OmegaConf

from qst_tune.config.trials import Halving, parse_trials, title, trial_config
from qst_tune.errors import UserError


def settings_of(block: object) -> list[dict[str, object]]:
    return list(parse_trials(OmegaConf.create(block)).settings)


def test_a_grid_is_every_combination_in_dotted_or_nested_keys() -> None:
    expected = [
        {"optimizer.lr": lr, "model.rank": rank} for lr in (0.001, 0.003) for rank in (4, 8)
    ]
    assert settings_of({"grid": {"optimizer.lr": [1e-3, 3e-3], "model.rank": [4, 8]}}) == expected
    nested = {"grid": {"optimizer": {"lr": [1e-3, 3e-3]}, "model": {"rank": [4, 8]}}}
    assert settings_of(nested) == expected


def test_a_list_alone_is_short_for_list() -> None:
    items = [{"optimizer.lr": 1e-3}, {}, {"optimizer": {"betas": [0.9, 0.95]}}]
    expected = [{"optimizer.lr": 1e-3}, {}, {"optimizer.betas": [0.9, 0.95]}]
    assert settings_of(items) == settings_of({"list": items}) == expected


def test_draws_are_within_their_ranges_and_the_same_with_the_same_seed() -> None:
    ranges = {
        "optimizer.lr": [1e-4, 1e-2, "log"],
        "model.dropout": [0.0, 0.5],
        "model.rank": [4, 32],
        "model.reduction_factor": {"values": [4, 8, 16]},
    }
    drawn = settings_of({"random": {"n": 200, "seed": 1, **ranges}})
    assert drawn == settings_of({"random": {"n": 200, "seed": 1, **ranges}})
    assert drawn != settings_of({"random": {"n": 200, "seed": 2, **ranges}})
    rates = [one["optimizer.lr"] for one in drawn]
    assert min(rates) >= 1e-4
    assert max(rates) <= 1e-2
    # Half of log-uniform draws are below the middle of the logarithms: 100 of 200, +- 4 sigma.
    assert 72 <= sum(math.log10(rate) < -3 for rate in rates) <= 128
    assert {type(one["model.rank"]) for one in drawn} == {int}
    assert {one["model.rank"] for one in drawn} == set(range(4, 33))
    assert {one["model.reduction_factor"] for one in drawn} == {4, 8, 16}
    assert all(0 <= one["model.dropout"] <= 0.5 for one in drawn)


def test_a_trial_is_the_config_with_its_settings_and_the_order_of_the_whole() -> None:
    raw = OmegaConf.create(
        {"seed": 3, "output_dir": "run", "logs": "${output_dir}/logs", "trials": [{"seed": 5}]}
    )
    assert OmegaConf.to_container(trial_config(raw, {"seed": 5}, 2), resolve=True) == {
        "seed": 5,
        "data_seed": 3,
        "output_dir": "run/trials/2",
        "logs": "run/trials/2/logs",
    }
    assert "data_seed" not in trial_config(raw, {"optimizer.lr": 1.0}, 1)
    assert raw.output_dir == "run"


def test_halving_is_at_ever_longer_steps_before_the_end() -> None:
    assert Halving(50).steps(400) == [50, 100, 200]
    assert Halving(10, 3).steps(91) == [10, 30, 90]
    assert Halving(50).steps(50) == []


def test_settings_are_shown_as_on_the_command_line() -> None:
    assert title({"optimizer.lr": 1e-3, "model.variant": "paper"}) == (
        'optimizer.lr=0.001 model.variant="paper"'
    )


REFUSED = {
    "two choices": ({"grid": {"seed": [1]}, "list": [{}]}, "has list and grid of"),
    "none": ({"halving": {"first_step": 2}}, "has none of list, grid, random"),
    "an empty list": ({"list": []}, "trials.list is empty"),
    "no list": ({"list": {"seed": 1}}, "trials.list must be a list of blocks"),
    "an axis without values": ({"grid": {"seed": []}}, r"trials.grid: seed=\[\] must be a list"),
    "too many": ({"grid": {"seed": list(range(300))}}, "more than 256"),
    "draws without n": ({"random": {"seed": 1}}, "trials.random must have n"),
    "a range upside down": ({"random": {"n": 1, "model.rank": [8, 4]}}, "must be .low, high."),
    "no range": ({"random": {"n": 1, "optimizer.lr": {}}}, "must be .low, high."),
    "no seed": ([{"seed": None}, {}], "seed=None must be a number"),
    "a logarithm of 0": ({"random": {"n": 1, "optimizer.lr": [0, 1, "log"]}}, "low above 0"),
    "too few values": ({"random": {"n": 3, "seed": 0, "model.rank": {"values": [1, 2]}}}, "hold 2"),
    "a model's own key": ({"grid": {"model.repair_rank": [0, 8]}}, "is of the backbone"),
    "rows": ({"grid": {"dataset.data_files": ["a"]}}, "is of the batches"),
    "the loss": ({"grid": {"loss.beta": [1]}}, "is the same for all trials"),
    "no factor": ({"list": [{}], "halving": {"first_step": 1, "factor": 1}}, "factor, 2 or more"),
    "no switch": ({"list": [{}], "soup": "yes"}, "soup=yes must be True or False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_choice_is_refused_in_one_line(case: str) -> None:
    block, expected = REFUSED[case]
    with pytest.raises(UserError, match=expected) as error:
        parse_trials(OmegaConf.create(block))
    assert "\n" not in str(error.value)
