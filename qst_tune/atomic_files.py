"""Files and directories that are whole or absent, whenever the process or the machine dies."""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qst_tune.errors import os_errors


@contextmanager
def whole_file(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to, which replaces it at once when the block ends.

    ``flush`` makes it survive a power cut; a cache need not wait for that. Raises OSError if it
    cannot be written; what was there is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        if flush:
            _flush_file(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty directory that replaces ``directory`` at once when the block ends.

    It is flushed to disk and renamed. UserError if it cannot be written; what was there is
    untouched.
    """
    with os_errors(f"write {directory}"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        new, old = room / "new", room / "old"
        try:
            new.mkdir()  # with the user's permissions, unlike the one around it
            yield new
            _flush(new)
            _put_in_place(new, directory, old)
        finally:
            if directory.exists() or not old.exists():  # else the old one is still there
                shutil.rmtree(room, ignore_errors=True)
        _flush_names(directory.parent)


def write_directory(
    directory: Path, files: Mapping[str, bytes], *, private: Collection[str] = ()
) -> None:
    """Write a whole directory, which replaces one that exists, from contents by path inside it.

    Only the user can read the ``private`` ones.
    """
    with whole_directory(directory) as new:
        for name, content in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600 if name in private else 0o666)
            path.write_bytes(content)


def replace_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files by name into a directory that keeps its others; each is whole or as it was."""
    with os_errors(f"write {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with whole_file(directory / name) as aside:
                aside.write_bytes(content)
        _flush_names(directory)


def _put_in_place(new: Path, directory: Path, old: Path) -> None:
    if directory.exists():
        directory.rename(old)
    try:
        new.rename(directory)
    except BaseException:
        if old.exists():
            old.rename(directory)
        raise


def _flush(directory: Path) -> None:
    """Make what a directory contains survive a power cut."""
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            _flush_names(path)
        else:
            _flush_file(path)
    _flush_names(directory)


def _flush_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_names(directory: Path) -> None:
    """Make the names in a directory survive a power cut, too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
