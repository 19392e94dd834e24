"""Rows of a dataset on the hub, read through ``datasets`` and its cache."""

from collections.abc import Mapping
from typing import Any

from datasets import load_dataset

from qst_tune.data.json_values import without_nulls
from qst_tune.errors import UserError


class HubRows:
    """Rows of one split of a map-style dataset."""

    def __init__(self, rows: Any, name: str) -> None:
        self.rows = rows
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self.rows[index]
        return row

    def place(self, index: int) -> str:
        """Return the number and source of a row."""
        return f"row {index} of {self.name}"


def read_hub(source: str, split: str, **settings: Any) -> HubRows:
    """Load a split, or a part of one, of a dataset such as ``yahma/alpaca-cleaned``.

    ``settings`` are further arguments of ``datasets.load_dataset``; None is left out. A dataset
    that cannot be loaded is a UserError.
    """
    try:
        rows = load_dataset(source, split=split, **without_nulls(settings))
    except Exception as error:  # of the network, the hub, the cache and the formats: many types
        reason = " ".join(str(error).split())
        raise UserError(
            f"source={source} cannot be read from the hub ({type(error).__name__}: {reason}): name "
            "local files with dataset.data_files=my.jsonl, or correct dataset.source"
        ) from error
    return HubRows(rows, f"{source}, split {split}")
