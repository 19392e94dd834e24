"""Rows of a dataset: bad ones are named, and some can be split off for validation."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from qst_tune.errors import UserError
from qst_tune.training.torchtune_rows import check_chat_row
from qst_tune.training.vocabulary import SEQUENCES, Vocabulary


class CheckedRows:
    """A map-style dataset that names a bad row by number, and by line where it is a file of lines.

    ``name`` is the config's key, ``source`` the file or repository. A row with more tokens than
    ``max_seq_len``, or with ids outside ``vocabulary``, is bad.
    """

    def __init__(
        self,
        rows: Any,
        *,
        name: str,
        source: str,
        max_seq_len: int | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.rows = rows
        self.name = name
        self.source = source
        self.max_seq_len = max_seq_len
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        try:
            check_chat_row(self.rows, index)
            row = self.rows[index]
            problem = self._problem(row)
        except UserError as error:  # of a dataset of ours
            problem = str(error)
        except Exception as error:  # a missing column, or a conversation that a template refuses
            problem = " ".join(f"{type(error).__name__}: {error}".split())
        if problem:
            raise UserError(f"{self.name}: {self.place(index)} cannot be used: {problem}")
        return row

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def _problem(self, row: Any) -> str | None:
        """Return why a row that was read is of no use to the model; None if it is."""
        length = max(lengths_of(row), default=0)
        if self.max_seq_len is not None and length > self.max_seq_len:
            return too_long(length, self.max_seq_len)
        if not length:
            return "it has no tokens"
        return self.vocabulary.problem(row) if self.vocabulary else None

    def place(self, index: int) -> str:
        """Return number and source of a row and, in a file of lines, its line."""
        if hasattr(self.rows, "place"):  # a dataset of ours
            return str(self.rows.place(index))
        line = _line_of_row(Path(self.source), index, len(self))
        return f"row {index} of {self.source}" + (f" (line {line})" if line else "")

    def describe(self) -> str:
        """Describe in one line where the rows come from."""
        return str(self.rows.describe()) if hasattr(self.rows, "describe") else self.source


def lengths_of(row: dict[str, Any]) -> list[int]:
    """Return the number of tokens of each sequence of a row: one, or two for a preference."""
    return [len(row[tokens]) for tokens, _ in SEQUENCES if tokens in row]


def too_long(length: int, max_seq_len: int) -> str:
    """Explain why a row of ``length`` tokens is too long for a model, and what helps."""
    return (
        f"a row of {length} tokens is longer than the model's max_seq_len {max_seq_len}: set "
        f"tokenizer.max_seq_len={max_seq_len} or lower to truncate rows"
    )


def hold_out(rows: Any, fraction: float, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """Split rows at random into training and validation rows, each in the dataset's order.

    At least one row is held out.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    num_held_out = max(1, round(len(rows) * fraction))
    return Subset(rows, sorted(order[num_held_out:])), Subset(rows, sorted(order[:num_held_out]))


def row_numbers(rows: Any, indices: Sequence[int]) -> list[int]:
    """Return the numbers that rows of a part have in the whole dataset, for a user to look up."""
    if isinstance(rows, Subset):
        return row_numbers(rows.dataset, [rows.indices[i] for i in indices])
    numbers = getattr(rows, "numbers", None)  # of rows of which some are left out
    return list(indices) if numbers is None else [numbers[i] for i in indices]


def _line_of_row(path: Path, index: int, num_rows: int) -> int | None:
    """Line of a JSON-lines file, counted from 1; None if rows and lines do not correspond."""
    if path.suffix not in (".jsonl", ".json") or not path.is_file():
        return None
    with path.open("rb") as file:
        lines = [number for number, line in enumerate(file, start=1) if line.strip()]
    return lines[index] if len(lines) == num_rows else None
