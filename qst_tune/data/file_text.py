"""The lines of a text file, plain or compressed with gzip."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qst_tune.errors import UserError

_BOM = b"\xef\xbb\xbf"
# Byte order marks of encodings that editors call "Unicode".
_OTHER_MARKS = (b"\xff\xfe", b"\xfe\xff")


class FileText:
    """A file's lines, each found by the byte where it begins; a plain file stays on disk.

    ``.gz`` is decompressed into memory. An unreadable file, damaged gzip and UTF-16 are a
    UserError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content = _decompress(path) if path.suffix.lower() == ".gz" else None
        try:
            with self._open() as file:
                head = file.read(3)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if head[:2] in _OTHER_MARKS:
            raise UserError(f"{path} is UTF-16: save it as UTF-8")
        self._first = len(_BOM) if head == _BOM else 0

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield each line and the byte where it begins."""
        with self._open() as file:
            start = file.seek(self._first)
            for line in file:
                yield start, line
                start += len(line)

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


def _decompress(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}") from error
