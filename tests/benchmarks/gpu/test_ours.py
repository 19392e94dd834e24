"""The step is the one of the recipe: it trains the side network alone, from its own loss."""

import pytest
import torch

from benchmarks.backbones import BACKBONES
from benchmarks.gpu import ours
from benchmarks.gpu.random_weights import RandomWeights
from benchmarks.methods import random_batch

TINY = BACKBONES["tiny"]


def changed(model: torch.nn.Module, num_steps: int) -> set[str]:
    step = ours.recipe_step(model)
    before = {name: p.detach().clone() for name, p in model.side.named_parameters()}
    frozen = [p.requires_grad for name, p in model.named_parameters() if name[:5] != "side."]
    assert not any(frozen)
    for seed in range(num_steps):
        step(random_batch(TINY, 2, 32, seed))
    return {name for name, p in model.side.named_parameters() if not p.equal(before[name])}


def test_a_step_changes_the_side_network() -> None:
    model = ours.qst_model(TINY, RandomWeights(torch.device("cpu")))
    names = {name for name, _ in model.side.named_parameters()}
    assert changed(model, 3) == names


def test_the_dial_trains_lora_in_the_last_quarter_of_the_layers_too() -> None:
    model = ours.dial_model(TINY, RandomWeights(torch.device("cpu")), part=1 / 4)
    names = {name for name in changed(model, 2) if name.startswith("lora.")}
    assert names
    assert {name.split(".")[1] for name in names} == {str(TINY.num_layers - 1)}


def test_the_plain_step_is_the_same_step_and_leaves_everything_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed: list[bool] = []
    monkeypatch.setattr(ours, "allow_triton", allowed.append)
    batch = random_batch(TINY, 2, 32, seed=0)
    results = []
    for make_step in (ours.recipe_step, ours.plain_step):
        torch.manual_seed(0)
        model = ours.qst_model(TINY, RandomWeights(torch.device("cpu")))
        model.captured_passes = passes = object() if make_step is ours.plain_step else None
        make_step(model)(batch)
        assert model.captured_passes is passes
        results.append([p.detach() for p in model.side.parameters()])
    assert allowed == [False, True]
    torch.testing.assert_close(*results, rtol=0, atol=0)
