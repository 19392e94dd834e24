"""Rows of CSV, TSV and Parquet files."""

import csv
import io
from pathlib import Path

import pyarrow
import pyarrow.parquet

from qst_tune.data.rows.json_rows import FileText, decode
from qst_tune.data.values import JsonObject, names_of, quoted
from qst_tune.errors import UserError

csv.field_size_limit(2**31 - 1)  # 131,072 characters by default: long documents are longer


class CsvRows:
    """Rows below a header, all of whose values are text: an answer of "007" stays "007".

    A file that is not UTF-8, or is no CSV, is a UserError.
    """

    def __init__(self, text: FileText, delimiter: str) -> None:
        self.path = text.path
        records = _records(text, delimiter)
        _, self.header = records[0] if records else (0, [])
        self._records = records[1:]
        _check_header(self.header, text, delimiter)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, str]:
        _, values = self._records[index]
        if len(values) != len(self.header):
            raise UserError(
                f"it has {len(values)} fields and the header {len(self.header)} "
                f"({names_of(self.header)}): put quotes around values with a delimiter"
            )
        return dict(zip(self.header, values, strict=True))

    def place(self, index: int) -> str:
        """Return the file and line of a row."""
        return f"{self.path} (line {self._records[index][0]})"


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

    def __getitem__(self, index: int) -> JsonObject:
        (row,) = self._table.slice(index, 1).to_pylist()
        return dict(row)

    def place(self, index: int) -> str:
        """Return the file."""
        return str(self.path)


def _records(text: FileText, delimiter: str) -> list[tuple[int, list[str]]]:
    """Return the fields of each record, with the line where it ends; blank lines are none."""
    try:
        content = decode(text.read())
    except UserError as error:
        raise UserError(f"{text.path}: {error}") from error
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        return [(reader.line_num, record) for record in reader if record]
    except csv.Error as error:
        raise UserError(
            f"{text.path} is not CSV at line {reader.line_num}: {error}; quotes inside a value are "
            "doubled"
        ) from error


def _check_header(header: list[str], text: FileText, delimiter: str) -> None:
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{text.path}: the header names {quoted(twice)} twice; rename one")
    if len(header) == 1 and delimiter == "," and (";" in header[0] or "\t" in header[0]):
        raise UserError(
            f"{text.path}: the header {quoted(header[0])} has one column; separate columns by "
            "commas, or by tabs in a .tsv file"
        )
