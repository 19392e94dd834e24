import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.study import experiment
from benchmarks.study.experiment import (
    Place,
    Run,
    evaluate,
    execute,
    label_losses,
    optimizer_of,
    padded_for_graphs,
    train_step,
)
from benchmarks.study.methods import Method
from benchmarks.study.tasks import Task
from tests.benchmarks.study.support import one_of_two_words, tiny_learner
from tests.support.numbers import TINY

HERE = Place(Path("model"))


@pytest.fixture
def task():
    return one_of_two_words()


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
    before = execute(Run("rte", "qst", 1e-2, 0, 0, 8), task, HERE)
    after = execute(Run("rte", "qst", 1e-2, 60, 0, 8), task, HERE)
    assert before["curve"] == []
    assert before["tokens"] == 0
    assert len(after["curve"]) == 60
    assert after["held_out_loss"] < before["held_out_loss"] - 1
    assert after["trained"] == sum(p.numel() for p in tiny_learner().model.side.parameters())


def test_unseen_rows_are_measured_with_what_was_trained(task):
    run = Run("rte", "qst", 1e-2, 3, 0, 8)
    line = execute(run, task, HERE, unseen_after=30)
    held_out = Task("rte", task.train, task.unseen(0, 30).held_out, task.answers)
    assert line["unseen"] == execute(run, held_out, HERE)["held_out"]
    assert line["unseen_after"] == 30
    assert same_numbers(
        {k: v for k, v in line.items() if not k.startswith("unseen")}, execute(run, task, HERE)
    )


def test_padding_for_a_gpu_changes_no_loss(task):
    learner, batch = tiny_learner(), next(task.batches(0, 8))
    padded = padded_for_graphs(batch)
    assert padded["tokens"].shape == padded["labels"].shape == (8, 16)
    with torch.no_grad():
        losses = label_losses(learner, padded)
        # Products of other shapes round differently, in bf16.
        torch.testing.assert_close(losses, label_losses(learner, batch), rtol=0.01, atol=0.03)
    assert padded_for_graphs(padded)["tokens"].equal(padded["tokens"])


def test_kept_states_change_no_number(task, tmp_path):
    run = Run("rte", "qst", 1e-2, 3, 0, 8)
    plain = execute(run, task, HERE)
    for _ in range(2):
        kept = execute(run, task, Place(HERE.checkpoint, states=tmp_path / "states"))
        assert same_numbers(kept, plain)
        assert kept["states"]
    batches = 3 + len(list(task.held_out_batches()))
    assert len(list((tmp_path / "states" / "model").glob("*/*.safetensors"))) == batches


def same_numbers(one, other):
    how = ("states", "seconds")
    return all(one[key] == other[key] for key in one.keys() | other.keys() if key not in how)


def test_settings_of_the_dial_share_no_states_that_differ(task, tmp_path, monkeypatch):
    every = TINY["num_layers"]
    for depth in (0, 1, every):
        build = partial(tiny_learner, lora_layers=depth)
        monkeypatch.setitem(experiment.METHODS, "qst", Method("tiny", build, 1e-2))
        run = Run("rte", "qst", 1e-2, 2, 0, 8)
        place = Place(HERE.checkpoint, states=tmp_path)
        kept = [execute(run, task, place) for _ in range(2)]
        assert all(same_numbers(line, execute(run, task, HERE)) for line in kept)
        # With LoRA in all layers nothing is frozen.
        assert all(line["states"] == (depth < every) for line in kept)
    assert len(list((tmp_path / "model").iterdir())) == 2


def test_few_rows_come_again_in_every_epoch_and_their_states_with_them(task, tmp_path):
    run = Run("rte", "qst", 1e-2, 7, 0, 8, rows=24)
    line = execute(run, task, Place(HERE.checkpoint, states=tmp_path))
    assert len(line["seconds"]) == 3, "two epochs of three steps and one more step"
    batches = 3 + len(list(task.held_out_batches()))
    assert len(list((tmp_path / "model").glob("*/*.safetensors"))) == batches


def test_rows_at_a_time_take_the_step_of_the_whole_batch(task):
    batch = next(task.batches(0, 8))

    def stepped(rows):
        torch.manual_seed(0)
        learner = tiny_learner(rows=rows)
        loss = train_step(learner, torch.optim.SGD(learner.groups, lr=1.0), batch)
        return loss, torch.cat([p.detach().flatten() for p in learner.trained])

    (loss, whole), (loss_by_row, by_row) = stepped(None), stepped(3)
    # Products of bf16 differ with the shape of a batch.
    assert loss_by_row == pytest.approx(loss, abs=0.02)
    assert torch.nn.functional.cosine_similarity(whole, by_row, dim=0) > 0.999


def test_lora_beside_a_side_network_learns_at_a_third_of_the_rate():
    learner = tiny_learner(lora_layers=1)
    optimizer = optimizer_of(learner, 3e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    lora = {id(p) for p in learner.model.side.lora.parameters()}
    assert {rate for key, rate in rates.items() if key in lora} == {1e-3}
    assert {rate for key, rate in rates.items() if key not in lora} == {3e-3}


def test_one_seed_gives_one_result(task):
    runs = [execute(Run("rte", "qst", 1e-2, 4, 3, 8), task, HERE) for _ in range(2)]
    assert runs[0]["curve"] == runs[1]["curve"]
    assert math.isfinite(runs[0]["held_out_loss"])
