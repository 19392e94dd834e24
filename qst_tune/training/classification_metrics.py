"""The metrics of GLUE, each a few lines.

The tests compare them with scikit-learn and scipy, which as dependencies would take 200 MB.
"""

from collections.abc import Callable

import torch


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
