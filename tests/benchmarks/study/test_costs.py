"""What a step takes, on tiny models."""

from pathlib import Path

import pytest
import torch
from torchao.dtypes.nf4tensor import NF4Tensor

from benchmarks.study import costs
from benchmarks.study.costs import Plan, measure
from benchmarks.study.experiment import Place
from benchmarks.study.learners import Learner
from benchmarks.study.methods import Method
from benchmarks.study.tasks import Task
from qst_tune.models import qst_decoder
from qst_tune.modules.memory import parameter_bytes
from qst_tune.training.methods import parameter_groups
from tests.support.numbers import TINY, TINY_REDUCTION, tiny_backbone


def build(*, whole: bool) -> Learner:
    model = qst_decoder(tiny_backbone(tied=True), reduction_factor=TINY_REDUCTION)
    if whole:
        model.requires_grad_(True)
        return Learner(model, [{"params": list(model.parameters())}])
    return Learner(model, parameter_groups(model.side))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setitem(costs.METHODS, "full", Method("", lambda *_: build(whole=True), 1e-3))
    monkeypatch.setitem(costs.METHODS, "qst", Method("", lambda *_: build(whole=False), 1e-3))
    tokens = torch.arange(3, TINY["vocab_size"]).tolist()[:24]
    rows = [{"tokens": tokens, "labels": tokens} for _ in range(12)]
    task = Task("alpaca", rows, rows, [])
    return {cost.method: cost for cost in measure(Plan(task, ["full", "qst"], 2, 3, Place(Path())))}


def test_every_method_is_measured_on_the_same_batches(measured: dict) -> None:
    assert set(measured) == {"full", "qst"}
    for cost in measured.values():
        assert (cost.task, cost.batch_size, cost.tokens) == ("alpaca", 2, 48)
        assert cost.seconds > 0


def test_a_peak_holds_what_its_method_must_hold_and_nothing_of_the_others(measured: dict) -> None:
    model = build(whole=True).model
    whole = parameter_bytes(model)
    # AdamW's two moments and the gradients of all that trains; codes of 4 bits have no gradient.
    trains = sum(p.nbytes for p in model.parameters() if not isinstance(p, NF4Tensor))
    assert measured["full"].peak_bytes > whole + 3 * trains
    # As much again would be the other model.
    assert whole < measured["qst"].peak_bytes < 2 * whole + (1 << 20)
