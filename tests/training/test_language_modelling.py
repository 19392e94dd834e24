from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from qst_tune.config.cli import instantiate
from qst_tune.data.labels import align_labels
from qst_tune.errors import UserError
from qst_tune.models.setup import build_on_meta
from qst_tune.training.language_modelling import NextTokenTask, build_language_modelling
from qst_tune.training.qst_method import load_qst
from tests.support.checkpoints import finetune_config
from tests.support.numbers import TINY, random_tokens, tiny_backbone

CPU = torch.device("cpu")


def test_the_task_is_the_cross_entropy_of_each_labelled_token_given_those_before(
    tmp_path: Path,
) -> None:
    cfg = OmegaConf.create(finetune_config(tmp_path))
    tokenizer = instantiate(cfg.tokenizer, "tokenizer")
    model = build_on_meta(cfg, torch.float32)
    task, data = build_language_modelling(cfg, tokenizer, model, seed=0, device=CPU)
    load_qst(model, cfg, dtype=torch.float32, device=CPU)
    batch = next(iter(data.train.batches(0, start=0)))
    total, count = task.loss(model, batch)
    labels = batch["labels"]
    hidden = model(batch["tokens"])  # connected to the loss, it stops before the head
    assert hidden.shape == (*batch["tokens"].shape, model.tok_embeddings.embedding_dim)
    logits = model.output(hidden)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert count == (labels != -100).sum()
    learnt = labels[:, :-1] != -100
    assert torch.equal(labels[:, :-1][learnt], batch["tokens"][:, 1:][learnt])
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def task() -> NextTokenTask:
    return NextTokenTask(nn.CrossEntropyLoss(), torch.device("cpu"))


def test_loss_is_the_sum_over_the_labels(task: NextTokenTask) -> None:
    model, tokens = tiny_backbone(), random_tokens(2, 9)
    labels = tokens.clone()
    labels[0, :4] = -100
    total, count = task.loss(model, {"tokens": tokens, "labels": align_labels(labels)})
    logits = model(tokens)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    assert count == 5 + 8


def test_evaluation_is_the_mean_over_all_batches(task: NextTokenTask) -> None:
    model = tiny_backbone()
    batches = [
        {"tokens": t, "labels": align_labels(t)} for t in (random_tokens(3, 9), random_tokens(1, 4))
    ]
    sums = [task.loss(model, dict(batch)) for batch in batches]
    expected = sum(total.item() for total, _ in sums) / sum(count.item() for _, count in sums)
    assert task.evaluate(model, batches) == {"val_loss": pytest.approx(expected, rel=1e-6)}
    assert (task.monitor, task.higher_is_better) == ("val_loss", False)


def test_row_longer_than_the_model_is_told(task: NextTokenTask) -> None:
    tokens = random_tokens(1, TINY["max_seq_len"] + 1)
    with pytest.raises(UserError, match="longer than the model's max_seq_len"):
        task.loss(tiny_backbone(), {"tokens": tokens, "labels": tokens})
