"""Of two processes that want a directory one gets it, and its end frees it."""

import errno
import fcntl
import logging
import os
import signal
import time
from pathlib import Path

import pytest

from qst_tune.errors import UserError
from qst_tune.file_lock import LOCK_NAME, only_process

HELD, REFUSED = 0, 7


def hold(directory: Path, seconds: float) -> int:
    """Fork a process that holds the directory for so long; returns its id."""
    process = os.fork()
    if process:
        return process
    try:
        with only_process(directory, name="output_dir"):
            time.sleep(seconds)
    except UserError:
        os._exit(REFUSED)
    os._exit(HELD)


def status(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_until_held(directory: Path) -> None:
    while not (directory / LOCK_NAME).is_file() or not (directory / LOCK_NAME).stat().st_size:
        time.sleep(0.01)


@pytest.mark.parametrize("attempt", range(20))
def test_of_two_starts_at_once_one_is_refused(attempt: int, tmp_path: Path) -> None:
    processes = [hold(tmp_path, 0.3) for _ in range(2)]
    assert sorted(map(status, processes)) == [HELD, REFUSED]
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_the_refusal_names_the_holder(tmp_path: Path) -> None:
    process = hold(tmp_path, 60)
    try:
        wait_until_held(tmp_path)
        message = f"^output_dir={tmp_path} is in use by process {process} on .*: wait for that run"
        with pytest.raises(UserError, match=message), only_process(tmp_path, name="output_dir"):
            pass
        assert (tmp_path / LOCK_NAME).exists(), "it is still the holder's"
    finally:
        os.kill(process, signal.SIGKILL)
        status(process)


def test_kill_frees_it_even_if_a_worker_of_the_holder_lives_on(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        with only_process(tmp_path, name="output_dir"):
            worker = os.fork()
            if worker:
                os.write(writer, str(worker).encode())
            time.sleep(60)
        os._exit(0)
    worker = int(os.read(reader, 20))
    os.kill(holder, signal.SIGKILL)
    status(holder)
    try:
        with only_process(tmp_path, name="output_dir"):
            assert (tmp_path / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_that_was_deleted_between_opening_and_locking_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lockf, count = fcntl.lockf, iter(range(10))

    def lock(file: int, kind: int) -> None:
        if next(count) == 0:
            (tmp_path / LOCK_NAME).unlink()  # as by the holder before
        lockf(file, kind)

    monkeypatch.setattr(fcntl, "lockf", lock)
    with only_process(tmp_path, name="output_dir"):
        assert status(hold(tmp_path, 0)) == REFUSED


def test_a_file_system_without_locks_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(file: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with caplog.at_level(logging.WARNING), only_process(tmp_path, name="output_dir"):
        pass
    assert "cannot be locked ([Errno 37] No locks available): start no second run" in caplog.text


def test_a_directory_that_is_removed_meanwhile_is_no_error_of_the_lock(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    with only_process(directory, name="output_dir"):
        (directory / LOCK_NAME).unlink()
        directory.rmdir()
