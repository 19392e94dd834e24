"""One look at every row before training: what there is to learn, and what is cut or unusable.

The tokens are stored (:class:`RowStore`), so the first epoch need not tokenize again. One core
reads 3,500 rows of Alpaca a second with SmolLM2's tokenizer.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules.transforms.tokenizers import ModelTokenizer
from tqdm import tqdm

from qst_tune.data.batches.checked_rows import CheckedRows
from qst_tune.distributed.processes import is_main_process
from qst_tune.errors import UserError
from qst_tune.modules.model_limits import SEQUENCES, lengths_of

MAX_REASONS = 3
# 2^27 tokens with their labels. Later rows are read and tokenized again when a batch needs them.
MAX_STORED_BYTES = 2**30
NO_LABEL = (
    "raise tokenizer.max_seq_len if prompts fill it, and check which messages the dataset masks"
)

Row = dict[str, Any]


@dataclass
class Survey:
    """Figures of a dataset's rows."""

    name: str  # key of the dataset in the config
    description: str  # where the rows come from, and how they are read
    limit: int | None = None  # the tokenizer's max_seq_len
    labels: "array[int]" = field(default_factory=lambda: array("q"))  # to learn, of each good row
    num_tokens: int = 0  # of the good rows
    longest: int = 0  # tokens of the longest of them
    num_cut: int = 0  # rows that are longer than limit
    labels_lost: int = 0  # that the cut rows had
    num_dropped: int = 0  # rows that cannot be used
    reasons: list[str] = field(default_factory=list)  # why the first of these cannot, a line each
    first: Row = field(default_factory=dict)  # the first row that can be used
    without_labels: str | None = None  # place of the first row with nothing to learn
    digest: str = ""  # of the content of all rows

    @property
    def num_labels(self) -> int:
        """Tokens to learn, of all rows."""
        return sum(self.labels)

    @property
    def has_classes(self) -> bool:
        """Whether a row's label is one class or score, and no tokens."""
        return isinstance(self.first.get("labels"), int | float)


class RowStore:
    """Tokenized rows in memory, four bytes a token, up to ``max_bytes``; later rows are not kept.

    A row has whole numbers or lists of them.
    """

    def __init__(self, max_bytes: int = MAX_STORED_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._keys: tuple[str, ...] = ()
        self._rows: list[tuple[Any, ...]] = []
        self._is_full = False

    def add(self, row: Row) -> None:
        """Keep a row, unless one was not kept before: rows are found by their number."""
        if self._is_full:
            return
        self._keys = self._keys or tuple(row)
        try:
            values = tuple(map(_compact, row.values()))
        except (TypeError, OverflowError):  # not lists of numbers: of the user's own code
            self._is_full = True
            return
        size = sum(v.itemsize * len(v) for v in values if isinstance(v, array))
        self._is_full = tuple(row) != self._keys or self.num_bytes + size > self.max_bytes
        if not self._is_full:
            self.num_bytes += size
            self._rows.append(values)

    def get(self, index: int) -> Row | None:
        """Return the row that was added as number ``index``; None if it was not kept."""
        if index >= len(self._rows):
            return None
        values = (v.tolist() if isinstance(v, array) else v for v in self._rows[index])
        return dict(zip(self._keys, values, strict=True))


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
    rows: CheckedRows, tokenizer: ModelTokenizer, *, skip_bad_rows: bool
) -> tuple[SurveyedRows, Survey]:
    """Read every row once: the rows that can be used, and figures of all.

    The tokenizer's ``max_seq_len`` is lifted for a moment to see how long cut rows are. UserError
    for a row that cannot be used, unless ``skip_bad_rows``, or if none can.
    """
    survey = Survey(rows.name, rows.describe(), getattr(tokenizer, "max_seq_len", None))
    store, numbers, digest = RowStore(), array("q"), hashlib.sha256()
    is_silent = not is_main_process()
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


def labels_of(row: Row) -> list[int]:
    """Return the number of tokens to learn of each sequence of a row.

    The first token of a sequence is never learnt, since nothing precedes it; a class or a score is
    one label.
    """
    # A dataset without labels has a collate function that makes them.
    found = [row.get(labels, row[tokens]) for tokens, labels in SEQUENCES if tokens in row]
    return [1 if isinstance(v, int | float) else _num_learnt(v) for v in found]


def check_labels(
    name: str, surveys: Sequence[Survey], rows: Sequence[int] | None = None
) -> list[str]:
    """Return warnings of rows with no label, or one; UserError with the cause if no row has any.

    ``rows`` are numbers in all datasets of ``surveys`` together; None for all rows.
    """
    labels = [count for survey in surveys for count in survey.labels]
    counts = labels if rows is None else [labels[row] for row in rows]
    missing, single, number = counts.count(0), counts.count(1), len(counts)
    warnings = []
    if missing:
        cause = _cause(surveys)
        if missing == number:
            raise UserError(f"{name}: none of its {number} rows has a token to learn: {cause}")
        places = [survey.without_labels for survey in surveys if survey.without_labels]
        warnings.append(
            f"{name}: {missing} of {number} rows have no token to learn, such as {places[0]}: "
            f"{cause}"
        )
    if single and not any(survey.has_classes for survey in surveys):
        warnings.append(
            f"{name}: {single} of {number} rows have one token to learn, as an empty answer's end"
        )
    return warnings


def _cause(surveys: Sequence[Survey]) -> str:
    limit = next((survey.limit for survey in surveys if survey.labels_lost), None)
    if limit is not None:
        return (
            f"the prompts alone fill tokenizer.max_seq_len={limit}, and the answers are cut off; "
            "raise it, or shorten the prompts"
        )
    return (
        "there is no assistant message or text, all are masked (weight 0) or empty, or the chat "
        "template does not mark where answers begin"
    )


def _count(
    survey: Survey, rows: CheckedRows, index: int, row: Row, tokenizer: ModelTokenizer
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


def _whole_row(rows: CheckedRows, index: int, tokenizer: ModelTokenizer) -> Row:
    """The row as it is without the tokenizer's limit."""
    limit, tokenizer.max_seq_len = tokenizer.max_seq_len, None
    try:
        row: Row = rows.rows[index]
        return row
    finally:
        tokenizer.max_seq_len = limit


def _num_learnt(labels: Any) -> int:
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    learnt: int = len(values) - 1 - values[1:].count(CROSS_ENTROPY_IGNORE_IDX)
    return learnt


def _add_to_digest(digest: "hashlib._Hash", row: Row) -> None:
    for key in sorted(row):
        value = row[key].tolist() if hasattr(row[key], "tolist") else row[key]
        digest.update(key.encode())
        try:
            digest.update(array("q", value).tobytes())
        except (TypeError, OverflowError):
            digest.update(repr(value).encode())


def _compact(value: object) -> Any:
    if isinstance(value, int | float):
        return value
    if not isinstance(value, list):
        raise TypeError
    return array("i", value)
