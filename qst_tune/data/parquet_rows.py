"""Rows of a Parquet file."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from qst_tune.errors import UserError


class ParquetRows:
    """Rows of a Parquet file; a damaged file is a UserError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Memory-mapped, and decompressed: as large in memory as its columns.
            self._table = pyarrow.parquet.read_table(path, memory_map=True, partitioning=None)
        except (OSError, pyarrow.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is not a whole Parquet file: {reason}") from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        (row,) = self._table.slice(index, 1).to_pylist()
        return dict(row)

    def place(self, index: int) -> str:
        """Return the file."""
        return str(self.path)
