"""Streams that cannot show everything, or are closed, and routine lines of other packages."""

import logging
import os
import subprocess
import sys

import pytest

from qst_tune import terminal
from qst_tune.errors import UserError

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


ATTACKS = {
    "clears the screen": "\x1b[2J",
    "renames the window": "\x1b]0;title\x07",
    "one byte of C1": "\x9b31m",
    "hides a line": "safe\rharmful",
    "erases": "a\x08\x7f",
    "reverses text": "\u202egnp.exe",
    "breaks a line": "a\u2028b\x0b\x85",
    "half a character": "\udc80\ud800",
    "nul": "a\x00b",
}


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_control_characters_are_written_out(text: str) -> None:
    result = terminal.shown(text)
    assert result.isprintable()
    assert result.encode("utf-8")
    assert terminal.shown("Zeile\n\tzwei 日本 🙂 é") == "Zeile\n\tzwei 日本 🙂 é"
    assert str(UserError(f"column {text}")) == f"column {result}"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_no_stream_carries_them(text: str, stream: str) -> None:
    code = f"import sys; print({text!a}, file=sys.{stream})"
    out, err = run(code, PYTHONIOENCODING="utf-8").communicate()
    assert (out + err).decode() == terminal.shown(text) + "\n"


def test_loggers_and_warnings_carry_none() -> None:
    code = (
        "import logging, sys, warnings\n    logging.getLogger('x').error('\\x1b[2J')\n"
        "    warnings.warn('\\x1b[2J')"
    )
    before = "import logging; logging.basicConfig()\n"
    source = f"{before}from qst_tune.terminal import safe_streams\nwith safe_streams():\n    {code}"
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert "\x1b" not in result.stdout + result.stderr
    assert result.stderr.count("\\x1b[2J") == 2


def test_progress_bars_are_drawn_as_ever() -> None:
    source = (
        "import sys, time; from tqdm import tqdm\n"
        "for _ in tqdm(range(2), mininterval=0):\n"
        "    for _ in tqdm(range(2), mininterval=0, bar_format='{{n}}'): pass\n"
        "    tqdm.write('line')"
    )
    code = f"exec({source.replace('{{', '{').replace('}}', '}')!r})"
    shown = run(code, PYTHONIOENCODING="utf-8").communicate()
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert shown[0] == plain.stdout == b"line\nline\n"
    assert b"\\x1b" not in shown[1]
    assert shown[1].count(b"\x1b[A") == plain.stderr.count(b"\x1b[A") > 0
