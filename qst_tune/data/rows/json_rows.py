"""Rows of a JSON file: one object a line (JSONL), one list of objects, or a list inside an object.

``datasets`` reads these too, but fits all rows into one Arrow schema: a value of another type in
row 7,000 fails without its row, and an object that lacks a key gets it with null, also inside tool
calls. Here each row is exactly its own text, and a mistake is reported with its line.
"""

import gzip
import io
import json
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from qst_tune.data.rows.forms import FORMS
from qst_tune.data.values import JsonObject, kind_of, names_of, quoted
from qst_tune.errors import UserError

_BOM = b"\xef\xbb\xbf"
# Byte order marks of encodings that editors call "Unicode".
_OTHER_MARKS = (b"\xff\xfe", b"\xfe\xff")
# Longer lines, and gzip files with more inside, are no training data and would fill the memory.
MAX_LINE_BYTES = 2**28
MAX_GZIP_BYTES = 2**31
# A single object with these is a row of one conversation, not a file around a list of rows.
_MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})


# JSON's escape of half a surrogate pair, perhaps with its other half behind it.
_HALF = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


class FileText:
    """A text file whose lines are found by the byte where they begin; a plain file stays on disk.

    ``.gz`` is decompressed into memory. An unreadable file, damaged gzip, UTF-16 and a line of more
    than 256 MiB are a UserError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content = _decompress(path) if path.suffix.lower() == ".gz" else None
        try:
            with self._open() as file:
                head = file.read(3)
        except (OSError, ValueError) as error:  # ValueError: the path has a null byte
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} cannot be read: {reason}") from error
        if head[:2] in _OTHER_MARKS:
            raise UserError(f"{path} is UTF-16: save it as UTF-8")
        self._first = len(_BOM) if head == _BOM else 0

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield each line and the byte where it begins."""
        with self._open() as file:
            start, number = file.seek(self._first), 1
            while line := file.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(
                        f"{self.path}: line {number} has more than {MAX_LINE_BYTES / 2**20:.0f} "
                        "MiB: write one example a line"
                    )
                yield start, line
                start, number = start + len(line), number + 1

    def line_at(self, start: int) -> bytes:
        """Read the line that begins at a byte, with its line end."""
        with self._open() as file:
            file.seek(start)
            return file.readline()

    def read(self) -> bytes:
        """Read everything except a byte order mark."""
        with self._open() as file:
            file.seek(self._first)
            return file.read()

    def _open(self) -> BinaryIO:
        return self.path.open("rb") if self._content is None else io.BytesIO(self._content)


class JsonLines:
    """Rows of a file with one JSON object a line; a line is parsed when its row is read."""

    def __init__(self, text: FileText) -> None:
        self.text = text
        self._starts = array("q")
        self._numbers = array("q")  # lines, counted from 1
        for number, (start, line) in enumerate(text.lines(), start=1):
            if line.strip():
                self._starts.append(start)
                self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> JsonObject:
        return as_row(parse(decode(self.line(index)).rstrip()))

    def line(self, index: int) -> bytes:
        """Return the line of a row: JSON, if the file is correct."""
        return self.text.line_at(self._starts[index])

    def place(self, index: int) -> str:
        """Return the file and line of a row."""
        return f"{self.text.path} (line {self._numbers[index]})"


class JsonList:
    """Rows of a file that is one JSON document."""

    def __init__(self, path: Path, rows: list[Any]) -> None:
        self.path = path
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> JsonObject:
        return as_row(self.rows[index])

    def place(self, index: int) -> str:
        """Return the file."""
        return str(self.path)


def read_json_rows(text: FileText) -> JsonLines | JsonList:
    """Read the rows of a JSON file.

    One JSON document that is damaged or has several lists of rows is a UserError.
    """
    lines = JsonLines(text)
    if _begins_document(lines):
        return JsonList(text.path, _rows_of(read_document(text), text.path))
    first = _document(lines.line(0)) if len(lines) == 1 else None
    rows = _rows_of(first, text.path) if isinstance(first, dict | list) else None
    # A damaged line, or one that is no object, is reported when its row is read, with its number.
    return lines if rows is None or rows == [first] else JsonList(text.path, rows)


def parse(text: str) -> Any:
    """Parse one row; what is no JSON, or is no text inside, is a UserError."""
    try:
        return _loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"it is not JSON at column {error.colno}: {error.msg}; mend or delete the line"
        ) from error
    except ValueError as error:
        raise UserError(str(error)) from error


def as_row(value: object) -> JsonObject:
    """Return a value that must be an object of columns."""
    if not isinstance(value, dict):
        raise UserError(f'it is {kind_of(value)}, not an object of columns: {{"text": "..."}}')
    return value


def decode(line: bytes) -> str:
    """Decode UTF-8; another encoding is a UserError."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"it is not UTF-8 (byte 0x{line[error.start]:02x} at {error.start}): save the file as "
            "UTF-8"
        ) from error


def _decompress(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            content = file.read(MAX_GZIP_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}") from error
    if len(content) > MAX_GZIP_BYTES:
        raise UserError(f"{path} has more than {MAX_GZIP_BYTES / 2**30:.0f} GiB inside: unpack it")
    return content


def _begins_document(lines: JsonLines) -> bool:
    """Whether the first of several lines begins a document instead of being one."""
    if len(lines) < 2 or _document(lines.line(0)) is not None:
        return False
    first, second = (lines.line(index).strip()[:1] for index in (0, 1))
    return first == b"[" or (first == b"{" and second != b"{")


def read_document(text: FileText) -> Any:
    """Read a file that is one JSON document; what is no JSON is a UserError with its place."""
    try:
        return _loads(decode(text.read()))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{text.path} is not JSON at line {error.lineno}, column {error.colno}: {error.msg}; "
            "mend it there, or write one object a line"
        ) from error
    except ValueError as error:
        raise UserError(f"{text.path}: {error}") from error


def _document(line: bytes) -> Any:
    """The value of a line; None if it is not JSON."""
    try:
        return _loads(decode(line))
    except ValueError:
        return None


def _rows_of(document: object, path: Path) -> list[Any]:
    """The list of rows that a document is or contains, or a document as the only row."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict) or any(form.columns[0] in document for form in FORMS):
        return [document]
    lists = {name: value for name, value in document.items() if _is_list_of_rows(value)}
    if len(lists) > 1:
        raise UserError(
            f"{path} has several lists of rows ({names_of(lists)}): save the one to use as a file "
            "of its own"
        )
    return next(iter(lists.values()), [document])


def _is_list_of_rows(value: object) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
        return False
    return not any(keys <= value[0].keys() for keys in _MESSAGE_KEYS)


def _loads(text: str) -> Any:
    """Parse JSON; ValueError for duplicate keys, NaN, deep nesting and halves of characters."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply: no row has so many levels") from error
    half = _HALF.search(text)
    if half and not _is_text(value):
        raise ValueError(f"{half.group()} is half a character, which no text has: delete it")
    return value


def _is_text(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _object(pairs: list[tuple[str, object]]) -> JsonObject:
    result = dict(pairs)
    if len(result) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {quoted(twice)} is there twice in one object: delete one")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no value of JSON: write null, or delete it")
