"""Matrices decay; gates, norms, biases and mixes do not."""

import pytest
import torch

from qst_tune.models import qst_decoder
from qst_tune.modules.side.config import VARIANTS
from qst_tune.training.parameter_groups import parameter_groups, scale_rates
from tests.support.numbers import TINY_REDUCTION, tiny_backbone


@pytest.fixture(params=VARIANTS)
def side(request: pytest.FixtureRequest):
    settings = {"reduction_factor": TINY_REDUCTION, "rank": 4, "variant": request.param}
    return qst_decoder(tiny_backbone(), **settings).side


def test_every_parameter_is_in_exactly_one_group(side) -> None:
    grouped = [id(p) for group in parameter_groups(side) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in side.parameters())


def test_only_matrices_decay(side) -> None:
    names = {id(parameter): name for name, parameter in side.named_parameters()}
    decayed, undecayed = (
        {names[id(p)] for p in group["params"]} for group in parameter_groups(side)
    )
    assert all(side.get_parameter(name).ndim == 2 for name in decayed)
    assert {
        name for name in names.values() if name.startswith(("gates.", "output_mix."))
    } <= undecayed
    assert {name for name in names.values() if "norm" in name or name.endswith("bias")} <= undecayed
    assert "blocks.0.attn.q_proj.weight" in decayed


def test_weight_decay_leaves_gates_norms_and_mixes_where_they_are(side) -> None:
    """Without gradients, decay is all that an optimizer step does."""
    before = {name: p.detach().clone() for name, p in side.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(side), lr=1.0, weight_decay=0.5)
    for parameter in side.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in side.named_parameters():
        factor = 0.5 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=0, atol=0)


def test_frozen_parameters_and_empty_groups_are_left_out(side) -> None:
    for parameter in side.parameters():
        parameter.requires_grad_(parameter.ndim == 2)
    (group,) = parameter_groups(side)
    assert {p.ndim for p in group["params"]} == {2}


def test_head_of_a_classifier_learns_at_a_rate_that_falls_with_its_width(side) -> None:
    width = side.upsample.out_features
    side.score = torch.nn.Linear(width, 3, bias=False)
    optimizer = torch.optim.AdamW(parameter_groups(side), lr=0.5)
    scale_rates(optimizer)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.pop(id(side.score.weight)) == pytest.approx(0.5 * 64 / width)
    assert set(rates.values()) == {0.5}
    assert len(rates) == len(list(side.parameters())) - 1
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.25 * 64 / width)
