"""Streams that cannot show everything, or are closed, and routine lines of other packages."""

import logging
import os
import subprocess
import sys

import pytest

from qst_tune import terminal

NAME = "torchtune.utils._logging"


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    logger = logging.getLogger(NAME)
    monkeypatch.setattr(logger, "filters", [])
    return logger


def passes(logger: logging.Logger, message: str) -> bool:
    return bool(logger.filter(logging.LogRecord(NAME, logging.WARNING, "", 0, message, (), None)))


def test_routine_lines_alone_are_hidden(logger: logging.Logger) -> None:
    terminal.hide_routine_lines()
    terminal.hide_routine_lines()
    assert len(logger.filters) == 1
    assert not passes(logger, " Profiling disabled.")
    assert passes(logger, "Skipping import of cpp extensions due to incompatible torch version")
    assert passes(logger, "the loss is not finite")


def test_a_variable_shows_them(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QST_TUNE_VERBOSE", "1")
    terminal.hide_routine_lines()
    assert passes(logger, " Profiling disabled.")


def run(code: str, **variables: str) -> subprocess.Popen[bytes]:
    source = f"from qst_tune.terminal import safe_streams\nwith safe_streams():\n    {code}"
    return subprocess.Popen(
        [sys.executable, "-c", source],
        env={**os.environ, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_what_stdout_lacks_is_replaced(encoding: str) -> None:
    process = run("print('it \u2192 \u65e5')", PYTHONIOENCODING=encoding)
    assert process.communicate() == (b"it ? ?\n", b"")
    assert process.returncode == 0


def test_input_that_cannot_be_decoded_is_replaced() -> None:
    process = run("print(ascii(input()))", PYTHONIOENCODING="utf-8")
    assert process.communicate(b"a\xe9b\n")[0] == b"'a\\ufffdb'\n"


@pytest.mark.parametrize("code", ["[print('x' * 99) for _ in range(9999)]", "print('x'); exit(2)"])
def test_a_closed_pipe_ends_silently(code: str) -> None:
    process = run(f"input(); {code}")
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_a_broken_pipe_of_something_else_is_a_defect() -> None:
    process = run("raise BrokenPipeError('a worker')")
    assert b"BrokenPipeError: a worker" in process.communicate()[1]


def test_control_characters_of_a_message_never_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal.print_errors(["dtype=\x1b[31mred\x07\x85\u202e is none; größer"])
    assert capsys.readouterr().err == r"error: dtype=\x1b[31mred\x07\x85\u202e is none; größer" "\n"
