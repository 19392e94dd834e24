from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qst_tune.config.components import instantiate
from qst_tune.data.batches.collate import align_labels
from qst_tune.errors import UserError
from qst_tune.models import qst_decoder
from qst_tune.models.build import build_on_meta
from qst_tune.training.language_modelling import (
    NextTokenTask,
    build_language_modelling,
    validation_passes,
)
from qst_tune.training.methods import load_qst
from qst_tune.training.monitor import Monitor
from qst_tune.training.task import complete
from tests.support.checkpoints import finetune_config
from tests.support.configs import typed_config
from tests.support.numbers import TINY, TINY_REDUCTION, random_tokens, randomize_, tiny_backbone

CPU = torch.device("cpu")


def test_the_task_is_the_cross_entropy_of_each_labelled_token_given_those_before(
    tmp_path: Path,
) -> None:
    cfg = typed_config(finetune_config(tmp_path))
    tokenizer = instantiate(cfg.tokenizer, "tokenizer")
    model = build_on_meta(cfg.model, torch.float32)
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
    assert complete(task.evaluating(model, batches)) == {
        "val_loss": pytest.approx(expected, rel=1e-6)
    }
    assert task.monitor == Monitor("val_loss")


def test_row_longer_than_the_model_is_reported(task: NextTokenTask) -> None:
    tokens = random_tokens(1, TINY["max_seq_len"] + 1)
    with pytest.raises(UserError, match="longer than the model's max_seq_len"):
        task.loss(tiny_backbone(), {"tokens": tokens, "labels": tokens})


CPU = torch.device("cpu")


@pytest.fixture
def model():
    model = qst_decoder(tiny_backbone(), reduction_factor=TINY_REDUCTION, rank=4)
    randomize_(model.side)
    return model


def batch(num_rows: int, length: int) -> dict[str, torch.Tensor]:
    tokens = random_tokens(num_rows, length)
    return {"tokens": tokens, "labels": align_labels(tokens)}


def test_every_label_weighs_the_same(model) -> None:
    batches = [batch(3, 12), batch(1, 3)]
    with torch.no_grad():
        log_probabilities = [
            model(b["tokens"])[:, :-1].log_softmax(-1).gather(-1, b["tokens"][:, 1:, None])
            for b in batches
        ]
    expected = -torch.cat([p.flatten() for p in log_probabilities]).double().mean()
    actual = complete(validation_passes(model, nn.CrossEntropyLoss(), batches, CPU))
    assert actual == pytest.approx(expected.item(), rel=1e-6)


def test_rows_without_a_label_are_passed_over_and_refused_alone(model) -> None:
    empty = batch(1, 5)
    empty["labels"].fill_(-100)
    with pytest.raises(UserError, match=r"^validation: none of its rows has a label"):
        complete(validation_passes(model, nn.CrossEntropyLoss(), [empty], CPU))
    full = batch(1, 5)
    alone = complete(validation_passes(model, nn.CrossEntropyLoss(), [full], CPU))
    assert complete(validation_passes(model, nn.CrossEntropyLoss(), [empty, full], CPU)) == alone


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_put_back_and_no_gradient_is_left(training: bool, model) -> None:
    model.train(training)
    seen = []
    model.side.norm.register_forward_hook(lambda *args: seen.append(model.side.training))
    complete(validation_passes(model, nn.CrossEntropyLoss(), [batch(1, 5)], CPU))
    assert seen == [False]
    assert model.training is model.side.training is training
    assert all(p.grad is None for p in model.parameters())
