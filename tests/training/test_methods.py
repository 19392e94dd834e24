"""What the training loop is told of a QST model."""

from pathlib import Path

import pytest
import torch

from qst_tune.backbone.identity import BackboneId
from qst_tune.models import qst_decoder
from qst_tune.modules.side.config import VARIANTS
from qst_tune.results.tuned_directory import Provenance
from qst_tune.training.methods import TunedMethod, parameter_groups, scale_rates
from tests.support.numbers import TINY_REDUCTION, randomize_, tiny_backbone


def method_of(variant: str) -> TunedMethod:
    model = qst_decoder(tiny_backbone(), variant=variant, reduction_factor=TINY_REDUCTION, rank=4)
    randomize_(model.side)
    return TunedMethod(
        model, Provenance(BackboneId("tiny", "0" * 64, "nf4"), {"rank": 4}, "epochs: 1\n")
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_statistics_are_those_of_the_parameters(variant: str) -> None:
    method = method_of(variant)
    side = method.model.side
    gammas = torch.cat([p.flatten() for n, p in side.named_parameters() if n.endswith(".gamma")])
    betas = 1 / (1 + torch.exp(-gammas.double()))
    expected = {
        "gate_mean": betas.mean(),
        "gate_min": betas.min(),
        "gate_max": betas.max(),
        "upsample_rms": side.upsample.weight.double().pow(2).mean().sqrt(),
    }
    mixes = {n: p.double() for n, p in side.named_parameters() if n.startswith("output_mix.")}
    if "output_mix.alpha" in mixes:
        expected["mix_mean"] = mixes["output_mix.alpha"].mean()
    if "output_mix.logit" in mixes:
        expected["mix_mean"] = torch.sigmoid(mixes["output_mix.logit"]).mean()
    actual = method.statistics()
    assert actual == pytest.approx({name: value.item() for name, value in expected.items()})


def test_everything_that_trains_is_in_the_files_and_comes_back(tmp_path: Path) -> None:
    method, other = method_of("default"), method_of("default")
    for name, content in method.files({"validation loss": 1.0}).items():
        (tmp_path / name).write_bytes(content)
    other.load(tmp_path)
    trained = {id(p) for group in method.parameter_groups() for p in group["params"]}
    names = [name for name, p in method.model.named_parameters() if id(p) in trained]
    assert names == [
        name for name, _ in method.model.named_parameters() if name.startswith("side.")
    ]
    after = dict(other.model.named_parameters())
    before = dict(method.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in names)


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
