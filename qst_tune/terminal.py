"""The output of our programs: text for any terminal, without routine lines of other packages.

Only the standard library, since ``plugin.py`` calls it before torchao is imported.
"""

from __future__ import annotations

import io
import logging
import os
import select
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import TextIO

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
    """Write an ``error:`` line for each; a control character is shown as its escape."""
    sys.stderr.writelines(f"error: {printable(line)}\n" for line in lines)


def printable(text: str) -> str:
    """Escape what would move a terminal's cursor, set its colours or forge lines."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Print "?" for a character that stdout cannot show, and end silently when its reader is gone.

    Raises SystemExit with status 141 if the reader of stdout or stderr closed it (``| head``).
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
        if not closed:
            raise
        for stream in closed:  # otherwise Python complains when it flushes them at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(CLOSED_PIPE_STATUS)


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
