"""The task of classifying sequences, or of giving them a score."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torchtune.modules import TransformerDecoder

from qst_tune.config.components import instantiate
from qst_tune.config.schema import Block
from qst_tune.data.batches.loader import Batch
from qst_tune.distributed.processes import gather_lists, sum_or_fail
from qst_tune.distributed.sharding import take_part
from qst_tune.errors import UserError
from qst_tune.modules.model_limits import check_length
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.training.monitor import Monitor
from qst_tune.training.task import Passes, visit


@dataclass(frozen=True)
class ClassificationTask:
    """Loss and metrics of one label a row; see :class:`~qst_tune.training.task.Task`.

    ``loss_function`` is a mean over rows: of logits ``[B, C]`` and int64 labels ``[B]``, or of
    scores ``[B]`` and fp32 labels.
    """

    loss_function: Any
    metrics: Sequence[str]  # names in METRICS, the most telling first
    device: torch.device

    rows_an_example: ClassVar[int] = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            raise UserError(
                f"dataset: metrics={list(self.metrics)} must be some of {', '.join(METRICS)}"
            )

    @property
    def monitor(self) -> Monitor:
        """The first metric."""
        return Monitor(self.metrics[0], higher_is_better=True)

    def loss(self, model: TransformerDecoder, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the losses, nats or squares of scores, and the number of rows B.

        ``tokens`` and ``padding_mask`` of the batch are ``[B, T]``, ``labels`` are ``[B]``.
        """
        labels = batch["labels"]
        num_rows = torch.tensor(len(labels), device=labels.device)
        return self.loss_function(self._output(model, batch), labels) * num_rows, num_rows

    def take_part(self, model: nn.Module) -> None:
        """Run a sharded model on one token, as the processes do that have a batch."""
        take_part(model, self.device)

    def evaluating(
        self, model: TransformerDecoder, batches: Iterable[Batch]
    ) -> Passes[dict[str, float]]:
        """Judge every row once. Collective: all ranks call it and get the same figures."""
        outputs: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []

        def add(batch: Batch) -> None:
            outputs.append(self._output(model, batch).cpu())
            labels.append(batch["labels"].cpu())

        error = yield from visit(model, batches, self.device, add)
        sum_or_fail(torch.zeros(1), error)
        output, label = torch.cat(gather_lists(outputs)), torch.cat(gather_lists(labels))
        predictions = output.argmax(-1) if output.ndim == 2 else output
        figures = {name: METRICS[name](predictions, label) for name in self.metrics}
        return {**figures, "val_loss": self.loss_function(output, label).item()}

    def _output(self, model: TransformerDecoder, batch: Batch) -> torch.Tensor:
        """Logits ``[B, C]``, or scores ``[B]`` where there is one label."""
        check_length(batch["tokens"], model.max_seq_len)
        logits: torch.Tensor = model(batch["tokens"], padding_mask=batch["padding_mask"])
        return logits.squeeze(-1) if model.num_labels == 1 else logits


def build_classification_task(
    block: Block, model: QSTClassifier, datasets: Iterable[Any], device: torch.device
) -> ClassificationTask:
    """Build the task, with the metrics of the last dataset; the training rows come first.

    UserError if a dataset has no classes, or others than the model, or the loss is of another task.
    """
    metrics: Sequence[str] = ()
    for dataset in map(labelled_rows, datasets):
        if dataset.num_labels != model.num_labels:
            raise UserError(
                f"model.num_labels={model.num_labels}, but the dataset needs "
                f"{dataset.num_labels}: set model.num_labels={dataset.num_labels}"
            )
        metrics = dataset.metrics
    loss = instantiate(block, "loss")
    gives_scores = model.num_labels == 1
    is_of_scores = isinstance(loss, torch.nn.MSELoss)
    if hasattr(loss, "set_model_output") or is_of_scores != gives_scores:
        raise UserError(
            f"loss: {block._component_} does not fit model.num_labels={model.num_labels}; use "
            f"torch.nn.{'MSELoss' if gives_scores else 'CrossEntropyLoss'}"
        )
    return ClassificationTask(loss, metrics, device)


def labelled_rows(dataset: Any) -> Any:
    """Find the dataset of labelled rows below what may wrap it: a subset, rows that are checked."""
    while not hasattr(dataset, "num_labels"):
        dataset = getattr(dataset, "rows", getattr(dataset, "dataset", None))
        if dataset is None:
            raise UserError(
                "dataset: a classifier needs rows with a label: use "
                "qst_tune.data.classification_dataset or glue_dataset"
            )
    return dataset


def accuracy(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of predictions that are right."""
    return (predictions == labels).double().mean().item()


def f1(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    """Harmonic mean of precision and recall of class 1; 0 if it neither occurs nor is predicted."""
    hits = ((predictions == 1) & (labels == 1)).sum().item()
    total = (predictions == 1).sum().item() + (labels == 1).sum().item()
    return 2 * hits / total if total else 0.0


def matthews(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    """Matthews' correlation: Pearson's, of two binary variables.

    0 if all predictions or all labels are equal, as in scikit-learn.
    """
    constant = len(predictions.unique()) < 2 or len(labels.unique()) < 2
    return 0.0 if constant else pearson(predictions, labels)


def pearson(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    """Pearson's correlation, -1 to 1; NaN if the predictions or the labels are constant."""
    return torch.corrcoef(torch.stack([predictions.double(), labels.double()]))[0, 1].item()


def spearman(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    """Spearman's correlation: Pearson's, of the ranks."""
    return pearson(_ranks(predictions), _ranks(labels))


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks, where equal values share the mean of theirs."""
    _, group, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    mean_ranks: torch.Tensor = last - (count - 1) / 2
    return mean_ranks[group]


METRICS: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
