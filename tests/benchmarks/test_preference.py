"""A step of DPO beside one of fine-tuning: the same rows, and both train."""

import torch
from torchtune.rlhf.loss import DPOLoss

from benchmarks.methods import CPU, qst_model, qst_trainee
from benchmarks.preference import main, preference_step, random_pairs
from qst_tune.training.preference import PreferenceTask


def test_the_table_has_a_line_for_each_prompt(capsys) -> None:
    main(["--backbone", "tiny", "--tokens", "8", "--prompt-tokens", "0", "6", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["8 of 8", "2 of 8"]


def test_pairs_share_their_prompt_which_has_no_label() -> None:
    batch = random_pairs(500, num_pairs=3, num_tokens=9, num_prompt=4)
    chosen, rejected = batch["tokens"].chunk(2)
    assert torch.equal(chosen[:, :4], rejected[:, :4])
    assert not torch.equal(chosen[:, 4:], rejected[:, 4:])
    assert (batch["labels"] == -100).sum() == 6 * 4
    assert torch.equal(batch["labels"][:, 3:-1], batch["tokens"][:, 4:])


def test_steps_learn_to_prefer() -> None:
    trainee = qst_trainee(qst_model("tiny"))
    task = PreferenceTask(DPOLoss(), CPU)
    batch = random_pairs(500, num_pairs=2, num_tokens=9, num_prompt=4)
    losses = [preference_step(trainee, task, batch) for _ in range(4)]
    assert abs(losses[0] - torch.tensor(2.0).log()) < 1e-4  # it is its own reference at first
    assert losses[-1] < losses[0]
