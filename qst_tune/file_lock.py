"""A lock on a directory that ends with its process, also after kill -9."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_NAME = ".lock"


@contextmanager
def locked(directory: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a directory, which is made if needed, while the block runs.

    Yields whether it is held: without ``wait`` another process may hold it, and some network file
    systems have no locks. The kernel frees it when the process ends. OSError if the directory
    cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Open for writing: over NFS an exclusive lock needs that.
    with (directory / LOCK_NAME).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
        else:
            yield True
