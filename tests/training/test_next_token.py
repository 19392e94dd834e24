"""The next-token task gives sums, so that every label weighs the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qst_tune.errors import UserError
from qst_tune.training.labels import align_labels
from qst_tune.training.next_token import NextTokenTask
from tests.helpers import TINY, random_tokens, tiny_backbone


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
