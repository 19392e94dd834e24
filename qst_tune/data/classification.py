"""Labelled texts as examples of a classifier."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import load_dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from qst_tune.data.batches.collate import LENGTH_MULTIPLE
from qst_tune.data.values import JsonObject
from qst_tune.errors import UserError

Row = dict[str, Any]


class ClassificationDataset(Dataset[Row]):
    r"""Texts made of a row's columns, with the number of their class or their score.

    A text that is longer than the tokenizer's ``max_seq_len`` loses its start, after the first
    token: the model answers to the end. ``template`` has columns in braces, such as
    ``"{sentence}\nSentiment:"``; ``labels`` are the names of the classes in the order of their
    numbers, None if the label is a score; ``metrics`` judge predictions
    (:mod:`qst_tune.training.classification`), the most informative first.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        rows: Sequence[JsonObject],
        *,
        template: str,
        labels: Sequence[str] | None,
        metrics: Sequence[str],
    ) -> None:
        self.tokenizer = tokenizer
        self.rows = rows
        self.template = template
        self.labels = None if labels is None else list(labels)
        self.metrics = tuple(metrics)

    @property
    def num_labels(self) -> int:
        """Number of classes; 1 for a score."""
        return 1 if self.labels is None else len(self.labels)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        """Return ``tokens``, a list of ids, and ``labels``, an int or, for a score, a float.

        A label that is not among ``labels`` is a UserError.
        """
        row = self.rows[index]
        return {"tokens": self.encode(row), "labels": self._label(row["label"])}

    def encode(self, row: JsonObject) -> list[int]:
        """Tokenize a row, whose label is not read."""
        text = self.template.format_map(row)
        tokens: list[int] = self.tokenizer.encode(text, add_bos=True, add_eos=False)
        limit = self.tokenizer.max_seq_len
        if limit is not None and len(tokens) > limit:
            tokens = [tokens[0], *tokens[len(tokens) - limit + 1 :]]
        return tokens

    def _label(self, label: Any) -> int | float:
        if self.labels is None:
            return float(label)
        if label in self.labels:
            return self.labels.index(label)
        if isinstance(label, int) and 0 <= label < len(self.labels):
            return label
        raise UserError(
            f"label {label!r} is neither one of {', '.join(self.labels)} nor the number of one "
            "(GLUE's test splits have no labels: use the validation split)"
        )


def classification_dataset(
    tokenizer: ModelTokenizer,
    *,
    source: str,
    template: str,
    labels: Sequence[str] | None = None,
    metrics: Sequence[str] = ("accuracy",),
    split: str = "train",
    **load_dataset_arguments: object,
) -> ClassificationDataset:
    """Load labelled rows, from local files or the hub.

    Args:
        tokenizer (ModelTokenizer): of torchtune's interface.
        source (str): "json" or "csv" with ``data_files``, or the name of a dataset on the hub.
        template (str): text with columns in braces.
        labels (Sequence[str] | None): names of the classes; None: the label is a score.
        metrics (Sequence[str]): "accuracy", "f1", "matthews", "pearson" or "spearman".
        split (str): as in ``datasets``: ``train[:1600]`` takes the first 1600 rows.
        **load_dataset_arguments (object): of ``datasets.load_dataset``.

    Returns:
        ClassificationDataset: the dataset.
    """
    rows = load_dataset(source, split=split, **load_dataset_arguments)
    return ClassificationDataset(tokenizer, rows, template=template, labels=labels, metrics=metrics)


def collate_classification(
    rows: Sequence[Row],
    *,
    pad_id: int,
    multiple: int = LENGTH_MULTIPLE,
    max_seq_len: int | None = None,
) -> dict[str, torch.Tensor]:
    """Make a batch, padded on the right to a multiple of ``multiple``, at most to ``max_seq_len``.

    It has ``tokens`` ``[B, T]``, ``padding_mask`` ``[B, T]`` with True for real tokens, and
    ``labels`` ``[B]``, int64 or, for scores, fp32.
    """
    lengths = torch.tensor([len(row["tokens"]) for row in rows])
    longest = int(lengths.max())
    padded = longest + -longest % multiple
    width = max(longest, min(padded, max_seq_len or padded))
    tokens = pad_sequence(
        [torch.tensor(row["tokens"]) for row in rows], batch_first=True, padding_value=pad_id
    )
    tokens = torch.nn.functional.pad(tokens, (0, width - longest), value=pad_id)
    return {
        "tokens": tokens,
        "padding_mask": torch.arange(width) < lengths[:, None],
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
