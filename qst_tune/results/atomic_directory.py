"""Directories that are whole or absent, whenever the process or the machine dies."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qst_tune.errors import os_errors


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty directory that replaces ``folder`` at once when the block ends.

    It is flushed to disk and renamed. UserError if it cannot be written; what was there is
    untouched.
    """
    with os_errors(f"write {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        new, old = room / "new", room / "old"
        try:
            new.mkdir()  # with the user's permissions, unlike the one around it
            yield new
            _flush(new)
            _put_in_place(new, folder, old)
        finally:
            if folder.exists() or not old.exists():  # else the old one is still there
                shutil.rmtree(room, ignore_errors=True)
        _flush_names(folder.parent)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a whole directory, which replaces one that exists, from contents by path inside it."""
    with whole_folder(folder) as new:
        for name, content in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by name into a directory that keeps its others; each is whole or as it was."""
    with os_errors(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            aside = folder / f".{name}.new"
            aside.write_bytes(content)
            _flush_file(aside)
            aside.replace(folder / name)
        _flush_names(folder)


def _put_in_place(new: Path, folder: Path, old: Path) -> None:
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise


def _flush(folder: Path) -> None:
    """Make what a directory contains survive a power cut."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _flush_names(path)
        else:
            _flush_file(path)
    _flush_names(folder)


def _flush_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_names(folder: Path) -> None:
    """Make the names in a directory survive a power cut, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
