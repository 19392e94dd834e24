"""What the training loop is told of a QST model."""

from pathlib import Path

import pytest
import torch

from qst_tune.backbone.identity import BackboneId
from qst_tune.models import qst_decoder
from qst_tune.modules.side.config import VARIANTS
from qst_tune.results.tuned_directory import Provenance
from qst_tune.training.qst_method import QSTMethod
from tests.support.numbers import TINY_REDUCTION, randomize_, tiny_backbone


def method_of(variant: str) -> QSTMethod:
    model = qst_decoder(tiny_backbone(), variant=variant, reduction_factor=TINY_REDUCTION, rank=4)
    randomize_(model.side)
    return QSTMethod(
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
