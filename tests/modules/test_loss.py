"""Whichever of torchtune's kinds a loss is, the number is the mean over labels."""

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn
from torchtune.modules.loss import CEWithChunkedOutputLoss

from qst_tune.data.labels import align_labels
from qst_tune.errors import UserError
from qst_tune.models import qst_decoder
from qst_tune.modules import LinearCrossEntropyLoss
from qst_tune.modules.loss import connect_loss, next_token_loss
from qst_tune.training.loss import build_loss
from tests.support.numbers import TINY_REDUCTION, random_tokens, randomize_, tiny_backbone

LOSSES = [LinearCrossEntropyLoss, CEWithChunkedOutputLoss, nn.CrossEntropyLoss]
IGNORED = -100


def model_and_batch():
    model = qst_decoder(tiny_backbone(), reduction_factor=TINY_REDUCTION, rank=4)
    randomize_(model.side)
    tokens = random_tokens(batch=2, length=11)
    labels = tokens.clone()
    labels[0, :5] = IGNORED
    labels[1, 8:] = IGNORED
    return model, {"tokens": tokens, "labels": align_labels(labels)}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradient_are_those_of_cross_entropy(loss_type) -> None:
    model, batch = model_and_batch()
    logits = model(batch["tokens"])
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    expected_grads = torch.autograd.grad(expected, list(model.side.parameters()))

    loss = loss_type()
    connect_loss(loss, model)
    actual, num_labels = next_token_loss(model, loss, batch)
    grads = torch.autograd.grad(actual, list(model.side.parameters()))

    assert num_labels.item() == 6 + 7  # positions 5 to 10 of row 0, 1 to 7 of row 1
    # fp32 sums over 13 tokens in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    for actual_grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_batch_without_labels_has_loss_and_gradient_zero(loss_type) -> None:
    model, batch = model_and_batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    loss = loss_type()
    connect_loss(loss, model)
    value, num_labels = next_token_loss(model, loss, batch)
    value.backward()
    assert (value.item(), num_labels.item()) == (0.0, 0)
    assert all(p.grad is None or not p.grad.any() for p in model.side.parameters())


def test_batch_is_left_as_it_was() -> None:
    model, batch = model_and_batch()
    before = {key: value.clone() for key, value in batch.items()}
    next_token_loss(model, nn.CrossEntropyLoss(), batch)
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[key], before[key]) for key in batch)


def test_build_loss_refuses_what_ignores_no_label() -> None:
    build_loss(OmegaConf.create({"_component_": "torch.nn.CrossEntropyLoss"}))
    with pytest.raises(UserError, match=r"torch\.nn\.MSELoss has no ignore_index.*LinearCrossEnt"):
        build_loss(OmegaConf.create({"_component_": "torch.nn.MSELoss"}))
