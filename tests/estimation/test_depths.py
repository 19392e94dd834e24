"""Prices of depths are those of whole steps, and the deepest that fits is that of trying all."""

from functools import partial
from typing import Any

import pytest
import torch

from qst_tune.estimation.depths import Deepest, Depths, depths_of
from qst_tune.estimation.estimate import MANY_ROWS, EstimateRequest
from qst_tune.estimation.step import Shape, StepCost, own_setup, trace_step
from qst_tune.modules.memory import GIB
from tests.estimation.test_step import PEQA, QST
from tests.support.real_step import training_config

MODEL = {**QST, "num_layers": 8, "num_side_blocks": 2, "lora_layers": 3}
SHAPE = Shape(2, 64)


def config(**changes: Any) -> Any:
    return training_config({**MODEL, **changes}, enable_activation_checkpointing=True)


def depths(cfg: Any, fit_gib: float | None = None) -> Depths:
    build = partial(own_setup, cfg, torch.bfloat16)
    asked = EstimateRequest(build, cfg, SHAPE, device="cuda", fit_gib=fit_gib)
    found = depths_of(asked, build)
    assert found is not None
    return found


def whole(lora_layers: int, shape: Shape = SHAPE) -> StepCost:
    cfg = config(lora_layers=lora_layers)
    return trace_step(own_setup(cfg, torch.bfloat16), cfg, shape, device="cuda")[0]


@pytest.mark.slow
def test_prices_are_those_of_whole_steps() -> None:
    prices = depths(config()).prices
    assert [price.lora_layers for price in prices] == [0, 1, 2, 3, 4, 8]
    without = whole(0)
    for price in (prices[0], prices[3], prices[-1]):
        cost = whole(price.lora_layers)
        assert price.peak_bytes == cost.memory.num_bytes
        assert price.trainable_parameters == cost.trainable_parameters
        relative = cost.flops_per_token / without.flops_per_token
        assert price.forwards / prices[0].forwards == pytest.approx(relative)


def test_a_layer_costs_two_forwards_of_it_if_it_is_recomputed() -> None:
    """Of a model whose head, side network and LoRA are small beside its layers."""
    sizes = {"embed_dim": 512, "intermediate_dim": 2048, "num_heads": 4, "vocab_size": 64}
    how = {"lora_rank": 1, "reduction_factor": 16, "num_side_blocks": 1}
    cfg = config(**sizes, **how)
    none, *_, all_layers = depths(cfg).prices
    assert none.forwards == pytest.approx(1, abs=0.05)
    assert all_layers.forwards - none.forwards == pytest.approx(2, abs=0.1)


@pytest.mark.slow
def test_lora_alone_begins_at_one_layer() -> None:
    prices = depths(config(num_side_blocks=0)).prices
    assert [price.lora_layers for price in prices] == [1, 2, 3, 4, 8]


@pytest.mark.slow
@pytest.mark.parametrize("fits", [0, 1, 6, 8])
def test_the_deepest_that_fits_is_that_of_trying_all(fits: int) -> None:
    limit = whole(fits).memory.num_bytes
    found = depths(config(), fit_gib=limit / GIB).deepest()
    assert found is not None
    assert found.lora_layers == fits
    assert fits == 8 or whole(fits + 1).memory.num_bytes > limit


@pytest.mark.slow
def test_nothing_fits_into_less_than_the_side_network_takes() -> None:
    limit = whole(0).memory.num_bytes - 1
    assert depths(config(), fit_gib=limit / GIB).deepest() is None


@pytest.mark.slow
def test_the_largest_batch_of_the_deepest_is_that_of_trying_all() -> None:
    limit = whole(8, Shape(5, 64)).memory.num_bytes
    found = depths(config(), fit_gib=limit / GIB).deepest()
    assert found == Deepest(8, 5, 128)
    assert whole(8, Shape(6, 64)).memory.num_bytes > limit


@pytest.mark.slow
def test_any_batch_fits_that_runs_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("qst_tune.training.task", "qst_tune.estimation.step"):
        monkeypatch.setattr(f"{module}.TOKENS_AT_ONCE", 128)
    limit = whole(8, Shape(MANY_ROWS, 64)).memory.num_bytes + 2**16
    answer = depths(config(), fit_gib=limit / GIB)
    assert answer.deepest() == Deepest(8, MANY_ROWS, 2)
    assert answer.report().endswith("8 of 8, with a batch of any size (2 rows at a time)")


@pytest.mark.slow
def test_the_table_marks_the_configs_own() -> None:
    answer = depths(config())
    lines = answer.table().splitlines()[-6:]
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3*", "4", "8"]
    assert answer.figures() == {"depths": [price.__dict__ for price in answer.prices]}


def test_peqa_has_no_depths() -> None:
    build = partial(own_setup, training_config(PEQA), torch.bfloat16)
    assert (
        depths_of(EstimateRequest(build, training_config(PEQA), SHAPE, device="cpu"), build) is None
    )
