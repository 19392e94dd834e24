"""The directory of a run: writable before anything heavy loads, gone if the run never began."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qst_tune.errors import UserError


@contextmanager
def output_directory(path: Path) -> Iterator[Path]:
    """Make a writable directory; if the block fails, remove what was made and is empty."""
    absent = [directory for directory in [path, *path.parents] if not os.path.exists(directory)]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise UserError(
                f"output_dir={path} is not writable ({error.strerror}): name another with "
                "output_dir=<directory>"
            ) from error
        yield path
    except BaseException:
        for directory in absent:
            _remove_empty(directory)
        raise


def _remove_empty(directory: Path) -> None:
    """Remove a directory that contains nothing but empty directories."""
    for root, _, _ in os.walk(directory, topdown=False):
        with suppress(OSError):
            Path(root).rmdir()
