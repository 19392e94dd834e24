import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.study import experiment
from benchmarks.study.experiment import Run, evaluate, execute
from benchmarks.study.learners import Learner, Method
from benchmarks.study.tasks import Task
from qst_tune.models import qst_decoder
from qst_tune.training.methods import parameter_groups
from tests.support.numbers import TINY, TINY_REDUCTION, tiny_backbone


def tiny_learner(_directory=None):
    model = qst_decoder(tiny_backbone(tied=True), reduction_factor=TINY_REDUCTION)
    return Learner(model, parameter_groups(model.side))


@pytest.fixture
def task():
    """The last token says whether the first was large: one of two words."""
    rows = []
    for seed in range(48):
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(3, TINY["vocab_size"], (5 + seed % 3,), generator=generator).tolist()
        tokens = [*words, 1 + (words[-1] > 30)]
        rows.append({"tokens": tokens, "labels": [-100] * len(words) + tokens[-1:]})
    return Task("rte", rows[:40], rows[40:], [1, 2])


@pytest.fixture(autouse=True)
def tiny_method(monkeypatch):
    monkeypatch.setitem(experiment.METHODS, "qst", Method("tiny", tiny_learner, 1e-2))


def test_evaluation_equals_one_row_at_a_time_without_padding(task):
    learner = tiny_learner()
    total, right = 0.0, 0
    for row in task.held_out:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = learner.model(torch.tensor([row["tokens"]]))[0, -2]
        total += F.cross_entropy(logits, torch.tensor(row["tokens"][-1])).item()
        right += int(logits[1:3].argmax()) + 1 == row["tokens"][-1]
    measured = evaluate(learner, task)
    # bf16 logits of about 4 are 0.03 apart.
    assert measured["held_out_loss"] == pytest.approx(total / len(task.held_out), abs=0.03)
    assert measured["first_label_loss"] == pytest.approx(measured["held_out_loss"])  # one a row
    assert measured["held_out"] == pytest.approx(100 * right / len(task.held_out), abs=13)


def test_the_first_label_is_the_first_of_each_row():
    rows = [
        {"tokens": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"tokens": [9, 4, 3, 2, 1], "labels": [-100, 4, 3, 2, 1]},
    ]
    task, learner = Task("alpaca", rows, rows, []), tiny_learner()
    cut = [
        {**rows[0], "labels": [-100, -100, 7, -100]},
        {**rows[1], "labels": [-100, 4, *[-100] * 3]},
    ]
    measured = evaluate(learner, task)
    alone = evaluate(learner, Task("alpaca", cut, cut, []))
    assert measured["first_label_loss"] == pytest.approx(alone["held_out_loss"], abs=1e-6)
    assert measured["first_label_loss"] != pytest.approx(measured["held_out_loss"], abs=1e-3)


def test_a_run_learns_its_task_and_says_with_what(task):
    before = execute(Run("rte", "qst", 1e-2, 0, 0, 8), task, None)
    after = execute(Run("rte", "qst", 1e-2, 60, 0, 8), task, None)
    assert before["curve"] == []
    assert before["tokens"] == 0
    assert len(after["curve"]) == 60
    assert after["held_out_loss"] < before["held_out_loss"] - 1
    assert after["trained"] == sum(p.numel() for p in tiny_learner().model.side.parameters())


def test_kept_states_change_no_number(task, tmp_path):
    run = Run("rte", "qst", 1e-2, 3, 0, 8)
    plain = execute(run, task, tmp_path / "model")
    for _ in range(2):
        assert execute(run, task, tmp_path / "model", tmp_path / "states") == plain
    batches = 3 + len(list(task.held_out_batches()))
    assert len(list((tmp_path / "states" / "model").glob("*/*.safetensors"))) == batches


def test_one_seed_gives_one_result(task):
    runs = [execute(Run("rte", "qst", 1e-2, 4, 3, 8), task, None) for _ in range(2)]
    assert runs[0]["curve"] == runs[1]["curve"]
    assert math.isfinite(runs[0]["held_out_loss"])
