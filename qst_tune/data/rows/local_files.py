"""Rows of local files (JSONL, JSON, CSV, TSV, Parquet; text also as ``.gz``) and of the hub."""

from bisect import bisect_right
from collections.abc import Sequence
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from datasets import ReadInstruction, load_dataset

from qst_tune.data.rows.json_rows import FileText, read_json_rows
from qst_tune.data.rows.table_rows import CsvRows, ParquetRows
from qst_tune.data.values import JsonObject, without_nulls
from qst_tune.errors import UserError

# Names under which `datasets` and torchtune's configs know the formats, as in source=json.
FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


class Rows(Protocol):
    """Rows with columns, each with a place that a user can look up."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> JsonObject: ...

    def place(self, index: int) -> str:
        """Return the file and, if there is one, the line of a row."""


class NamedRows(Rows, Protocol):
    """Rows of a whole dataset, with the name of their source."""

    name: str


class LocalRows:
    """Rows of several files, in order, or a ``selection`` of their numbers; ``name``: the files."""

    def __init__(
        self, files: Sequence[tuple[Path, Rows]], selection: Sequence[int] | None = None
    ) -> None:
        paths = [str(path) for path, _ in files]
        self.name = ", ".join(paths[:3]) + f" and {len(paths) - 3} files more" * (len(paths) > 3)
        self._parts = [rows for _, rows in files]
        self._ends = list(accumulate(len(rows) for rows in self._parts))
        self._selection = range(self._ends[-1]) if selection is None else selection

    def __len__(self) -> int:
        return len(self._selection)

    def __getitem__(self, index: int) -> JsonObject:
        part, number = self._find(index)
        return part[number]

    def place(self, index: int) -> str:
        """Return the number of a row in its file, the file and, if there is one, the line."""
        part, number = self._find(index)
        return f"row {number} of {part.place(number)}"

    def _find(self, index: int) -> tuple[Rows, int]:
        row = self._selection[index]
        part = bisect_right(self._ends, row)
        return self._parts[part], row - (self._ends[part - 1] if part else 0)


class HubRows:
    """Rows of one split of a map-style dataset of the hub."""

    def __init__(self, rows: Sequence[JsonObject], name: str) -> None:
        self.rows = rows
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> JsonObject:
        row: JsonObject = self.rows[index]
        return row

    def place(self, index: int) -> str:
        """Return the number and source of a row."""
        return f"row {index} of {self.name}"


def read_local_files(
    data_files: str | Sequence[str], *, source: str | None = None, split: str = "train"
) -> LocalRows:
    """Read local files in order; one that is missing, damaged or of no known format is a UserError.

    Args:
        data_files (str | Sequence[str]): paths or glob patterns; a path that exists is taken
            literally, even with brackets.
        source (str | None): ``json``, ``csv``, ``tsv`` or ``parquet`` for a file without a usual
            suffix.
        split (str): ``train``, or a part of it such as ``train[:1000]`` or ``train[90%:]``.

    Returns:
        LocalRows: the rows of the split.
    """
    names = [data_files] if isinstance(data_files, str) else [str(name) for name in data_files]
    paths = list(dict.fromkeys(path for name in names for path in find_files(name)))
    files = [(path, _read(path, source)) for path in paths]
    number = sum(len(rows) for _, rows in files)
    return LocalRows(files, _select(split, number))


def read_hub(source: str, split: str, **settings: object) -> HubRows:
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


def find_files(name: str) -> list[Path]:
    """Find the files of an existing path or of a glob pattern: at least one, and no directory."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"data_files={name} is a directory: name its files, as in {path}/*.jsonl")
    if path.exists():
        return [path]
    found = sorted(file for file in map(Path, glob(str(path), recursive=True)) if file.is_file())
    if not found:
        is_pattern = any(mark in name for mark in "*?[")
        raise UserError(
            f"data_files={name} "
            + ("matches no file" if is_pattern else "does not exist")
            + f" (looked from {Path.cwd()})"
        )
    return found


def _read(path: Path, source: str | None) -> Rows:
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    match FORMATS.get(name.suffix.lower(), source):
        case "json":
            return read_json_rows(FileText(path))
        case "csv":
            return CsvRows(FileText(path), ",")
        case "tsv":
            return CsvRows(FileText(path), "\t")
        case "parquet":
            return ParquetRows(path)
    raise UserError(
        f"data_files={path}: its ending is none of {', '.join(FORMATS)} (also .gz): convert it, or "
        "name its format with source=json"
    )


def _select(split: str, number: int) -> Sequence[int] | None:
    """Numbers of the rows of a split, in the notation of ``datasets``."""
    if split == "train":
        return None
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": number})
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"split={split} is not of a local file: use train, or a part such as train[:1000] or "
            "train[90%:]"
        ) from error
    return [row for part in parts for row in range(part.from_, part.to)]
