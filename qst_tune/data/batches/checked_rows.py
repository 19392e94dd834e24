"""Rows of a dataset: bad ones are named, and some can be split off for validation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from torch.utils.data import Subset
from torchtune.data import OpenAIToMessages, ShareGPTToMessages
from torchtune.datasets import SFTDataset

from qst_tune.data.batches.loader import MapDataset
from qst_tune.data.values import JsonObject, quoted
from qst_tune.errors import UserError
from qst_tune.modules.model_limits import ModelLimits, lengths_of
from qst_tune.torchtune_compat import rows_and_transform, source_column

_SHAREGPT_NAMES = ("system", "human", "gpt")
_INSTEAD = "dataset._component_=qst_tune.data.auto_dataset"


class CheckedRows:
    """A map-style dataset that names a bad row by number, and by line where it is a file of lines.

    ``name`` is the config's key, ``source`` the file or repository.
    """

    def __init__(
        self, rows: MapDataset, *, name: str, source: str, limits: ModelLimits | None = None
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
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        if problem:
            raise UserError(f"{self.name}: {self.place(index)} cannot be used: {problem}")
        return row

    def __iter__(self) -> Iterator[JsonObject]:
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
    """Split rows at random into training and at least one validation row, each in their order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    num_validation = max(1, round(len(rows) * fraction))
    parts = (sorted(order[num_validation:]), sorted(order[:num_validation]))
    return Subset(rows, parts[0]), Subset(rows, parts[1])


def row_numbers(rows: object, indices: Sequence[int]) -> list[int]:
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


# What torchtune's own datasets misread silently, or refuse without the cause.


def check_chat_row(dataset: object, index: int) -> None:
    """Refuse a conversation that torchtune 0.6.1's chat datasets would not learn as it is.

    Of a message without content, a tool call, its OpenAIToMessages keeps the content of the message
    before (torchtune issue 2617): the model would learn to repeat the user. Of a name other than
    human, gpt and system its ShareGPTToMessages raises ``KeyError`` alone.
    """
    if type(dataset) is not SFTDataset:
        return
    rows, transform = rows_and_transform(dataset)
    if type(transform) is OpenAIToMessages:
        _check(rows[index], source_column(transform, "messages"), _openai_problem)
    elif type(transform) is ShareGPTToMessages:
        _check(rows[index], source_column(transform, "conversations"), _sharegpt_problem)


def _check(row: JsonObject, column: str, problem_of: Callable[[JsonObject], str | None]) -> None:
    messages = row.get(column)
    for number, message in enumerate(messages if isinstance(messages, list) else []):
        problem = problem_of(message) if isinstance(message, Mapping) else None
        if problem:
            raise UserError(f"{column}[{number}]{problem}")


def _openai_problem(message: JsonObject) -> str | None:
    if message.get("tool_calls"):
        return f".tool_calls: torchtune's chat_dataset does not learn tool calls; use {_INSTEAD}"
    return None if message.get("content") is not None else f".content is null; use {_INSTEAD}"


def _sharegpt_problem(message: JsonObject) -> str | None:
    name = message.get("from")
    if name in _SHAREGPT_NAMES:
        return None
    return (
        f".from is {quoted(name)}: torchtune's chat_dataset knows {', '.join(_SHAREGPT_NAMES)}; "
        f"rename it, or use {_INSTEAD}, which takes user and assistant too"
    )


def with_literal_paths(block: DictConfig) -> DictConfig:
    """Let ``datasets`` take the name of an existing file literally, whatever brackets it has."""
    files = block.get("data_files")
    if not files or str(block.get("_component_")).endswith(".auto_dataset"):
        return block
    is_list = isinstance(files, ListConfig)
    names = [_literal(str(file)) for file in (files if is_list else [files])]
    return DictConfig({**block, "data_files": names if is_list else names[0]})


def _literal(name: str) -> str:
    has_mark = any(mark in name for mark in "*?[")
    return escape(name) if has_mark and Path(name).is_file() else name
