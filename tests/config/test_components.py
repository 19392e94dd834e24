"""Components are checked against their signatures without being called."""

from collections.abc import Callable

import pytest
import torch
from omegaconf import OmegaConf

from qst_tune.config.components import component_problems


def build(  # noqa: PLR0913
    rank: int,
    rate: float = 0.1,
    name: str = "x",
    flag: bool = False,
    limit: int | None = None,
    loose: "int" = None,  # noqa: RUF013
    rate_or_tensor: float | torch.Tensor = 0.1,
    anything: list[int] | int = 3,
    hook: Callable[[], None] | None = None,
) -> None:
    raise AssertionError("it must not be called")


def dataset(tokenizer: object, *, source: str) -> None:
    raise AssertionError("it must not be called")


def texts(config: dict) -> list[str]:
    return [problem.text for problem in component_problems(OmegaConf.create(config))]


def model(**arguments: object) -> dict:
    name = "tests.config.test_components.build"
    return {"model": {"_component_": name, "rank": 1, **arguments}}


@pytest.mark.parametrize(
    "arguments",
    [
        {"rate": 1, "name": "y", "flag": True, "limit": None, "loose": None},
        {"limit": 3, "rate": 1e-3, "rate_or_tensor": 1, "anything": "x", "hook": 3},
    ],
)
def test_right_types_pass(arguments: dict) -> None:
    assert texts(model(**arguments)) == []


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("rank", "four", "a whole number"),
        ("rank", 1.5, "a whole number"),
        ("rank", True, "a whole number"),
        ("rank", None, "a whole number"),
        ("rate", "fast", "a number"),
        ("rate", False, "a number"),
        ("name", 3, "text"),
        ("name", None, "text"),
        ("flag", 1, "True or False"),
        ("limit", "none", "a whole number"),
        ("loose", "x", "a whole number"),
        ("rate_or_tensor", "fast", "a number"),
    ],
)
def test_wrong_type_is_reported(argument: str, value: object, message: str) -> None:
    assert texts(model(**{argument: value})) == [f"model.{argument}={value} must be {message}"]


def test_value_that_is_taken_from_elsewhere_is_checked_there() -> None:
    assert texts({"name": None, **model(name="${name}")}) == []


def test_missing_argument_is_reported_but_not_those_that_the_recipe_gives() -> None:
    name = "tests.config.test_components"
    config = {
        "model": {"_component_": f"{name}.build"},
        "dataset": [{"_component_": f"{name}.dataset"}],
        "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1},
    }
    assert texts(config) == [
        f"model: {name}.build needs the argument 'rank'",
        f"dataset[0]: {name}.dataset needs the argument 'source'",
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss": 3}, "loss=3 must be a block with a _component_"),
        ({"loss": {}}, "loss: _component_ is missing"),
        ({"loss": [{}]}, "loss=[{}] must be a block with a _component_"),
        ({"dataset": [{}]}, "dataset[0]: _component_ is missing"),
    ],
)
def test_what_is_no_component_is_reported(config: dict, message: str) -> None:
    assert texts(config) == [message]


def test_what_an_earlier_version_had_is_named_with_what_to_use() -> None:
    (text,) = texts({"model": {"_component_": "qst_tune.models.qst_opt_125m"}})
    assert text.endswith("; OPT is qst_tune.models.qst_from_hf with its checkpoint_dir")
    (text,) = texts({"checkpointer": {"_component_": "qst_tune.training.opt_checkpointer.X"}})
    assert text.endswith("; use qst_tune.training.HFCheckpointer")
