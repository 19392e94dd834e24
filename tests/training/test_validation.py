"""Held-out loss is the mean over labels, not over batches."""

import pytest
import torch
from torch import nn

from qst_tune.data.labels import align_labels
from qst_tune.errors import UserError
from qst_tune.models import qst_decoder
from qst_tune.training.validation import validation_loss
from tests.support.numbers import TINY, TINY_REDUCTION, random_tokens, randomize_, tiny_backbone

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
    actual = validation_loss(model, nn.CrossEntropyLoss(), batches, CPU)
    assert actual == pytest.approx(expected.item(), rel=1e-6)


def test_rows_without_a_label_are_passed_over_and_refused_alone(model) -> None:
    empty = batch(1, 5)
    empty["labels"].fill_(-100)
    with pytest.raises(UserError, match=r"^validation: none of its rows has a label"):
        validation_loss(model, nn.CrossEntropyLoss(), [empty], CPU)
    full = batch(1, 5)
    alone = validation_loss(model, nn.CrossEntropyLoss(), [full], CPU)
    assert validation_loss(model, nn.CrossEntropyLoss(), [empty, full], CPU) == alone


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_put_back_and_no_gradient_is_left(training: bool, model) -> None:
    model.train(training)
    seen = []
    model.side.norm.register_forward_hook(lambda *args: seen.append(model.side.training))
    validation_loss(model, nn.CrossEntropyLoss(), [batch(1, 5)], CPU)
    assert seen == [False]
    assert model.training is model.side.training is training
    assert all(p.grad is None for p in model.parameters())


def test_row_longer_than_the_model_is_told(model) -> None:
    with pytest.raises(UserError, match=r"a row of 65 tokens .* max_seq_len 64"):
        validation_loss(model, nn.CrossEntropyLoss(), [batch(1, TINY["max_seq_len"] + 1)], CPU)
