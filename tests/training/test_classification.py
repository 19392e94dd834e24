"""Loss, figures and the checks that data, model and loss fit each other."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scipy import stats
from sklearn import metrics as sklearn_metrics
from torch import nn

from qst_tune.data import ClassificationDataset, collate_classification
from qst_tune.errors import UserError
from qst_tune.models import qst_decoder
from qst_tune.modules import QSTClassifier
from qst_tune.training.classification import METRICS, ClassificationTask, build_classification_task
from qst_tune.training.monitor import Monitor
from qst_tune.training.task import complete
from tests.support.numbers import TINY, TINY_REDUCTION, randomize_, tiny_backbone

CPU = torch.device("cpu")
# fp32 means over other batches.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def classifier(num_labels):
    model = QSTClassifier(
        qst_decoder(tiny_backbone(), reduction_factor=TINY_REDUCTION, rank=8), num_labels
    )
    randomize_(model.side)
    return model


def rows(count, num_labels):
    generator = torch.Generator().manual_seed(0)

    def row(index):
        length = int(torch.randint(1, 9, (), generator=generator))
        tokens = torch.randint(1, TINY["vocab_size"], (length,), generator=generator).tolist()
        return {"tokens": tokens, "labels": index % num_labels if num_labels > 1 else index / 2}

    return [row(index) for index in range(count)]


def batches(all_rows, batch_size):
    starts = range(0, len(all_rows), batch_size)
    return [collate_classification(all_rows[s : s + batch_size], pad_id=0) for s in starts]


def task(num_labels, metrics=("accuracy",)):
    loss = nn.MSELoss() if num_labels == 1 else nn.CrossEntropyLoss()
    return ClassificationTask(loss, metrics, CPU)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_loss_is_the_sum_over_rows_and_has_a_gradient(num_labels):
    model = classifier(num_labels).train()
    (batch,) = batches(rows(5, num_labels), 5)
    total, num_rows = task(num_labels).loss(model, batch)
    parts = [task(num_labels).loss(model, part)[0] for part in batches(rows(5, num_labels), 1)]
    assert num_rows == 5
    torch.testing.assert_close(total, sum(parts), **CLOSE)
    total.backward()
    assert model.side.score.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_figures_count_every_row_once_whatever_the_batches(batch_size):
    model, all_rows = classifier(3), rows(7, 3)
    model.train()
    figures = complete(task(3).evaluating(model, batches(all_rows, batch_size)))
    assert model.training
    logits = torch.cat([model(torch.tensor([row["tokens"]])) for row in all_rows])
    labels = torch.tensor([row["labels"] for row in all_rows])
    expected = sklearn_metrics.accuracy_score(labels, logits.argmax(-1))
    assert figures["accuracy"] == pytest.approx(expected)
    assert 0 < expected < 1, "all right or all wrong would show nothing"
    loss = nn.functional.cross_entropy(logits, labels).item()
    assert figures["val_loss"] == pytest.approx(loss, rel=1e-5)


def test_figures_of_a_regression_are_of_its_scores():
    model, all_rows = classifier(1), rows(7, 1)
    figures = complete(task(1, ("pearson", "spearman")).evaluating(model, batches(all_rows, 3)))
    with torch.no_grad():
        scores = torch.cat([model(torch.tensor([row["tokens"]]))[:, 0] for row in all_rows])
    labels = torch.tensor([row["labels"] for row in all_rows])
    assert figures["pearson"] == pytest.approx(
        torch.corrcoef(torch.stack([scores, labels]))[0, 1].item(), abs=1e-5
    )
    assert figures["val_loss"] == pytest.approx(((scores - labels) ** 2).mean().item(), rel=1e-5)


def test_the_first_metric_says_which_step_is_the_best():
    chosen = task(2, ("f1", "accuracy"))
    assert chosen.monitor == Monitor("f1", higher_is_better=True)


def test_a_row_longer_than_the_model_can_see_is_refused():
    model = classifier(2)
    row = {"tokens": [1] * (TINY["max_seq_len"] + 1), "labels": 0}
    with pytest.raises(UserError, match="longer than the model's max_seq_len"):
        complete(task(2).evaluating(model, batches([row], 1)))


# Data, model and loss must fit each other.


def build(num_labels, *, loss="CrossEntropyLoss", labels=("no", "yes"), metrics=("accuracy",)):
    dataset = ClassificationDataset(None, [], template="", labels=labels, metrics=metrics)
    cfg = OmegaConf.create({"loss": {"_component_": f"torch.nn.{loss}"}})
    model = SimpleNamespace(num_labels=num_labels)
    return build_classification_task(cfg.loss, model, [dataset], CPU)


def test_metrics_are_those_of_the_dataset():
    assert build(2, metrics=("f1", "accuracy")).monitor.name == "f1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_labels": 3}, "num_labels=3, but the dataset needs 2: set model.num_labels=2"),
        ({"num_labels": 2, "labels": None}, "num_labels=2, but the dataset needs 1"),
        ({"num_labels": 2, "loss": "MSELoss"}, r"does not fit .*; use torch\.nn\.CrossEntropyLoss"),
        ({"num_labels": 1, "labels": None}, r"does not fit .*; use torch\.nn\.MSELoss"),
        ({"num_labels": 2, "metrics": ("bleu",)}, r"metrics=\['bleu'\] must be some of accuracy"),
    ],
)
def test_a_mismatch_is_named_with_its_fix(settings, message):
    with pytest.raises(UserError, match=message):
        build(**settings)


def test_labels_of_a_part_of_a_dataset_are_those_of_the_whole():
    whole = ClassificationDataset(None, [], template="", labels=["a", "b"], metrics=["f1"])
    cfg = OmegaConf.create({"loss": {"_component_": "torch.nn.CrossEntropyLoss"}})
    part = torch.utils.data.Subset(whole, [])
    model = SimpleNamespace(num_labels=2)
    assert build_classification_task(cfg.loss, model, [part], CPU).monitor.name == "f1"


def test_a_dataset_of_conversations_is_refused():
    cfg = OmegaConf.create({"loss": {"_component_": "torch.nn.CrossEntropyLoss"}})
    with pytest.raises(UserError, match="a classifier needs rows with a label"):
        build_classification_task(cfg.loss, SimpleNamespace(num_labels=2), [[1, 2]], CPU)


# float64 sums in another order.
SAME = {"rel": 1e-9, "abs": 1e-9}
BINARY = {
    "accuracy": sklearn_metrics.accuracy_score,
    "f1": lambda labels, predictions: sklearn_metrics.f1_score(
        labels, predictions, zero_division=0.0
    ),
    "matthews": sklearn_metrics.matthews_corrcoef,
}
pairs_of_classes = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2)
# Few values, so that many tie.
pairs_of_scores = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.5, 2.0]), st.sampled_from([0.0, 1.0, 2.5, 5.0])),
    min_size=3,
)


@pytest.mark.parametrize("name", BINARY)
@given(pairs=pairs_of_classes)
@settings(max_examples=25, deadline=None)
def test_metrics_of_classes_equal_scikit_learn(name, pairs):
    predictions, labels = torch.tensor(pairs).unbind(1)
    expected = BINARY[name](labels.numpy(), predictions.numpy())
    assert METRICS[name](predictions, labels) == pytest.approx(expected, **SAME)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@given(pairs=pairs_of_scores)
@settings(max_examples=25, deadline=None)
def test_correlations_equal_scipy(name, pairs):
    predictions, labels = torch.tensor(pairs).unbind(1)
    actual = METRICS[name](predictions, labels)
    if len(predictions.unique()) < 2 or len(labels.unique()) < 2:
        assert math.isnan(actual)
        return
    function = stats.pearsonr if name == "pearson" else stats.spearmanr
    expected = function(predictions.numpy(), labels.numpy()).statistic
    # scipy's Pearson computes in the fp32 of its input.
    assert actual == pytest.approx(float(expected), abs=1e-6)


def test_accuracy_counts_more_than_two_classes():
    assert METRICS["accuracy"](torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 2, 1])) == 0.5
