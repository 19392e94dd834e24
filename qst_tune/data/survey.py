"""One look at every row before training: what there is to learn, and what is cut or unusable.

The tokens are stored (:mod:`~qst_tune.data.row_store`), so the first epoch need not tokenize
again. One core reads 3,500 rows of Alpaca a second with SmolLM2's tokenizer.
"""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from tqdm import tqdm

from qst_tune.data.row_store import RowStore
from qst_tune.data.rows import CheckedRows
from qst_tune.distributed.processes import rank_and_world_size
from qst_tune.errors import UserError
from qst_tune.modules.model_limits import SEQUENCES, lengths_of

MAX_REASONS = 3


@dataclass
class Survey:
    """Figures of a dataset's rows.

    Args:
        name (str): key of the dataset in the config.
        description (str): where the rows come from, and how they are read.
        limit (int | None): the tokenizer's ``max_seq_len``.
        labels (array[int]): tokens to learn, of each row that can be used.
        num_tokens (int): of these rows.
        longest (int): tokens of the longest of them.
        num_cut (int): rows that are longer than ``limit``.
        labels_lost (int): that the cut rows had.
        num_dropped (int): rows that cannot be used.
        reasons (list[str]): why the first of these cannot, one line each.
        first (dict[str, Any]): the first row that can be used.
        without_labels (str | None): place of the first row with nothing to learn.
        digest (str): of the content of all rows.
    """

    name: str
    description: str
    limit: int | None = None
    labels: "array[int]" = field(default_factory=lambda: array("q"))
    num_tokens: int = 0
    longest: int = 0
    num_cut: int = 0
    labels_lost: int = 0
    num_dropped: int = 0
    reasons: list[str] = field(default_factory=list)
    first: dict[str, Any] = field(default_factory=dict)
    without_labels: str | None = None
    digest: str = ""

    @property
    def num_labels(self) -> int:
        """Tokens to learn, of all rows."""
        return sum(self.labels)

    @property
    def has_classes(self) -> bool:
        """Whether a row's label is one class or score, and no tokens."""
        return isinstance(self.first.get("labels"), int | float)


class SurveyedRows:
    """The rows of a dataset that can be used, at ``numbers``; their tokens come from the store."""

    def __init__(self, rows: CheckedRows, numbers: "array[int]", store: RowStore) -> None:
        self.rows = rows
        self.numbers = numbers
        self._store = store

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        row = self._store.get(index)
        return self.rows[self.numbers[index]] if row is None else row

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


def survey_rows(
    rows: CheckedRows, tokenizer: Any, *, skip_bad_rows: bool
) -> tuple[SurveyedRows, Survey]:
    """Read every row once: the rows that can be used, and figures of all.

    The tokenizer's ``max_seq_len`` is lifted for a moment to see how long cut rows are. UserError
    for a row that cannot be used, unless ``skip_bad_rows``, or if none can.
    """
    survey = Survey(rows.name, rows.describe(), getattr(tokenizer, "max_seq_len", None))
    store, numbers, digest = RowStore(), array("q"), hashlib.sha256()
    is_silent = rank_and_world_size()[0] != 0
    name, count = f"reading {rows.name}", len(rows)
    for index in tqdm(range(count), desc=name, delay=2.0, leave=False, disable=is_silent):
        try:
            row = rows[index]
        except UserError as error:
            if not skip_bad_rows:
                raise
            survey.num_dropped += 1
            survey.reasons += [str(error)] * (len(survey.reasons) < MAX_REASONS)
            digest.update(b"dropped")
            continue
        numbers.append(index)
        store.add(row)
        _add_to_digest(digest, row)
        _count(survey, rows, index, row, tokenizer)
    if not numbers:
        raise UserError(
            f"{rows.name}: none of its {len(rows)} rows can be used; the first: {survey.reasons[0]}"
        )
    survey.digest = digest.hexdigest()
    return SurveyedRows(rows, numbers, store), survey


def _count(
    survey: Survey, rows: CheckedRows, index: int, row: dict[str, Any], tokenizer: Any
) -> None:
    lengths, labels = lengths_of(row), labels_of(row)
    survey.first = survey.first or row
    survey.num_tokens += sum(lengths)
    survey.longest = max(survey.longest, *lengths)
    survey.labels.append(0 if 0 in labels else sum(labels))
    if 0 in labels and survey.without_labels is None:
        survey.without_labels = rows.place(index)
    # torchtune's text rows are cut to one token less than the limit.
    if survey.limit is not None and max(lengths) >= survey.limit - 1:
        whole = _whole_row(rows, index, tokenizer)
        if sum(lengths_of(whole)) > sum(lengths):
            survey.num_cut += 1
            survey.labels_lost += max(0, sum(labels_of(whole)) - sum(labels))


def _whole_row(rows: CheckedRows, index: int, tokenizer: Any) -> Any:
    """The row as it is without the tokenizer's limit."""
    limit, tokenizer.max_seq_len = tokenizer.max_seq_len, None
    try:
        return rows.rows[index]
    finally:
        tokenizer.max_seq_len = limit


def labels_of(row: dict[str, Any]) -> list[int]:
    """Return the number of tokens to learn of each sequence of a row.

    The first token of a sequence is never learnt, since nothing precedes it; a class or a score is
    one label.
    """
    # A dataset without labels has a collate function that makes them.
    found = [row.get(labels, row[tokens]) for tokens, labels in SEQUENCES if tokens in row]
    return [1 if isinstance(v, int | float) else _num_learnt(v) for v in found]


def _num_learnt(labels: Any) -> int:
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    learnt: int = len(values) - 1 - values[1:].count(CROSS_ENTROPY_IGNORE_IDX)
    return learnt


def _add_to_digest(digest: Any, row: dict[str, Any]) -> None:
    for key in sorted(row):
        value = row[key].tolist() if hasattr(row[key], "tolist") else row[key]
        digest.update(key.encode())
        try:
            digest.update(array("q", value).tobytes())
        except (TypeError, OverflowError):
            digest.update(repr(value).encode())
