"""The output of our programs: text for any terminal, without routine lines of other packages.

What comes from files, models or the network may have control characters, which move a terminal's
cursor, rename its window or hide text. All of our output goes through :func:`shown`.

Only the standard library, since ``plugin.py`` calls it before torchao is imported.
"""

from __future__ import annotations

import io
import logging
import os
import re
import select
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, TextIO

# Shows the routine lines again.
VERBOSE_VARIABLE = "QST_TUNE_VERBOSE"
# What a shell reports of a program that SIGPIPE ended.
CLOSED_PIPE_STATUS = 141

# Logger -> what its routine lines contain; nothing in them is for the user of a recipe.
_ROUTINE_LINES = {
    # Kernels for other formats than NF4, which torchao writes in plain torch.
    "torchao": ("Skipping import of cpp extensions due to incompatible torch version",),
    "torchtune.utils._logging": ("Setting manual seed to local seed", "Profiling disabled."),
    "torch.distributed.run": ("Setting OMP_NUM_THREADS environment variable for each process",),
}


# Control characters except line breaks and tabs, other line breaks, those that change the direction
# of text, and halves of characters, which no encoding has.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# What a progress bar writes to go to another line; it begins each of its texts with a "\r".
_BAR_MOVES = re.compile(r"[\n\r]*(\x1b\[A)*")


def shown(text: str) -> str:
    """Write control characters as Python spells them; a terminal obeys none of these."""
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


class _ShownStream:
    """A stream whose texts are :func:`shown`; what a progress bar writes passes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        begin = "\r" if text.startswith("\r") else ""
        is_move = _BAR_MOVES.fullmatch(text)
        return self._stream.write(text if is_move else begin + shown(text.removeprefix("\r")))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


class _RoutineFilter(logging.Filter):
    """Drops the lines that contain one of some texts."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        super().__init__()
        self._texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in self._texts)


def hide_routine_lines() -> None:
    """Hide known lines of torchao, torchtune and torchrun; a second call changes nothing."""
    if os.environ.get(VERBOSE_VARIABLE):
        return
    for name, texts in _ROUTINE_LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _RoutineFilter) for known in logger.filters):
            logger.addFilter(_RoutineFilter(texts))


def print_errors(lines: Iterable[str]) -> None:
    """Write an ``error:`` line for each; control characters are :func:`shown`."""
    sys.stderr.writelines(f"error: {shown(line)}\n" for line in lines)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Print what any terminal can show, and end silently when its reader is gone.

    Control characters are :func:`shown`, and "?" is printed for what stdout's encoding lacks.
    Raises SystemExit with status 141 if the reader of stdout or stderr closed it (``| head``).
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with _shown_streams():
            yield
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
        if not closed:
            raise
        for stream in closed:  # otherwise Python complains when it flushes them at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(CLOSED_PIPE_STATUS)


@contextmanager
def _shown_streams() -> Iterator[None]:
    """Show all that is written to stdout and stderr, by loggers that exist already too."""
    plain = sys.stdout, sys.stderr
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    handlers = [h for log in loggers if isinstance(log, logging.Logger) for h in log.handlers]
    on_err = [
        handler
        for handler in handlers
        if isinstance(handler, logging.StreamHandler)
        and vars(handler).get("stream") is sys.stderr  # logging's own last one looks it up
    ]
    sys.stdout, sys.stderr = _ShownStream(sys.stdout), _ShownStream(sys.stderr)
    for handler in on_err:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in on_err:
            handler.setStream(plain[1])
        sys.stdout, sys.stderr = plain
        sys.stdout.flush()


def _is_closed(stream: TextIO) -> bool:
    """Whether nobody reads the pipe of a stream any more."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return False
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
