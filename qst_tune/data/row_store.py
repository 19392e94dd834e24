"""Tokenized rows in memory, four bytes a token, so that training does not tokenize them again."""

from array import array
from typing import Any

# 2^27 tokens with their labels. Later rows are read and tokenized again when a batch needs them.
MAX_BYTES = 2**30


class RowStore:
    """Rows of whole numbers or lists of them, up to ``max_bytes``; later rows are not kept."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._keys: tuple[str, ...] = ()
        self._rows: list[tuple[Any, ...]] = []
        self._is_full = False

    def add(self, row: dict[str, Any]) -> None:
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

    def get(self, index: int) -> dict[str, Any] | None:
        """Return the row that was added as number ``index``; None if it was not kept."""
        if index >= len(self._rows):
            return None
        values = (v.tolist() if isinstance(v, array) else v for v in self._rows[index])
        return dict(zip(self._keys, values, strict=True))


def _compact(value: Any) -> Any:
    if isinstance(value, int | float):
        return value
    if not isinstance(value, list):
        raise TypeError
    return array("i", value)
