"""The folder of a run: writable before anything heavy loads, gone again if the run never began."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qst_tune.errors import UserError


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Make a writable directory; if the block fails, remove what was made and is empty."""
    created = _make(path)
    try:
        yield path
    except BaseException:
        for folder in created:
            _remove_empty(folder)
        raise


def _make(path: Path) -> list[Path]:
    """Create the folder and probe it; returns the folders that were not there, innermost first."""
    absent = [folder for folder in [path, *path.parents] if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        for folder in absent:
            _remove_empty(folder)
        raise UserError(
            f"output_dir={path} is not writable ({error.strerror}): name another with "
            "output_dir=<folder>"
        ) from error
    return absent


def _remove_empty(folder: Path) -> None:
    """Remove a folder with nothing but empty folders in it."""
    for root, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            Path(root).rmdir()
