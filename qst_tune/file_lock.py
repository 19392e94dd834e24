"""Locks on a directory that end with their process, also after kill -9."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchtune import utils

from qst_tune.errors import UserError, os_errors

LOCK_NAME = ".lock"

log = utils.get_logger("INFO")


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


@contextmanager
def only_process(directory: Path, *, name: str) -> Iterator[None]:
    """Refuse a directory, which exists, that another process uses; ``name`` is the config's key.

    A POSIX record lock: other than :func:`locked`, workers that outlive a killed parent do not
    inherit it. It holds over NFS where the lock service runs; a file system without locks is
    logged. UserError names the process that has it.
    """
    file = _lock_or_refuse(directory / LOCK_NAME, f"{name}={directory}")
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):  # the directory may have been removed
                (directory / LOCK_NAME).unlink()
            os.close(file)


def _lock_or_refuse(path: Path, what: str) -> int | None:
    """Open and lock the file; None where there are no locks."""
    while True:
        with os_errors(f"write {path}"):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            holder = os.read(file, 200).decode(errors="replace") or "another process"
            os.close(file)
            raise UserError(
                f"{what} is in use by {holder}: wait for that run, or name another directory"
            ) from None
        except OSError as error:
            os.close(file)
            log.warning(f"{what} cannot be locked ({error}): start no second run in it")
            return None
        # The process before may have deleted the file between its opening and its locking here.
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file).st_ino:
                os.truncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return file
        os.close(file)
