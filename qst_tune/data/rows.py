"""Rows of a dataset: bad ones are named, and some can be split off for validation."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from qst_tune.data.torchtune_rows import check_chat_row
from qst_tune.errors import UserError
from qst_tune.modules.model_limits import ModelLimits, lengths_of


class CheckedRows:
    """A map-style dataset that names a bad row by number, and by line where it is a file of lines.

    ``name`` is the config's key, ``source`` the file or repository.
    """

    def __init__(
        self, rows: Any, *, name: str, source: str, limits: ModelLimits | None = None
    ) -> None:
        self.rows = rows
        self.name = name
        self.source = source
        self.limits = limits

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        try:
            check_chat_row(self.rows, index)
            row = self.rows[index]
            if any(lengths_of(row)):
                problem = self.limits.problem(row) if self.limits else None
            else:
                problem = "it has no tokens"
        except UserError as error:  # of a dataset of ours
            problem = str(error)
        except Exception as error:  # a missing column, or a conversation that a template refuses
            problem = " ".join(f"{type(error).__name__}: {error}".split())
        if problem:
            raise UserError(f"{self.name}: {self.place(index)} cannot be used: {problem}")
        return row

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def place(self, index: int) -> str:
        """Return number and source of a row and, in a file of lines, its line."""
        if hasattr(self.rows, "place"):  # a dataset of ours
            return str(self.rows.place(index))
        line = _line_of_row(Path(self.source), index, len(self))
        return f"row {index} of {self.source}" + (f" (line {line})" if line else "")

    def describe(self) -> str:
        """Describe in one line where the rows come from."""
        return str(self.rows.describe()) if hasattr(self.rows, "describe") else self.source


def hold_out(rows: Any, fraction: float, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """Split rows at random into training and validation rows, each in the dataset's order.

    At least one row is held out.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    num_validation = max(1, round(len(rows) * fraction))
    return Subset(rows, sorted(order[num_validation:])), Subset(
        rows, sorted(order[:num_validation])
    )


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
