"""Signals as a wish that the training loop grants at the end of a step."""

import os
import signal
import threading
from types import FrameType
from typing import Any

# SIGHUP: a terminal that was closed. SIGUSR1: Slurm's warning before its time limit.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class StopSignals:
    """A context in which Ctrl-C, ``kill`` and the like only set ``signal_number``.

    A second Ctrl-C interrupts at once. Does nothing outside of the main thread, where Python lets
    no handler be set.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """True once a signal has come."""
        return self.signal_number is not None

    @property
    def name(self) -> str:
        """Of the signal that has come."""
        return signal.Signals(self.signal_number).name if self.signal_number else "no signal"

    def request(self) -> None:
        """Act as if SIGTERM had come, unless one has."""
        self.signal_number = self.signal_number or signal.SIGTERM

    def exit_if_requested(self) -> None:
        """Leave the program as the signal would have done.

        Raises:
            SystemExit: with status 128 + its number, as a shell reports a signal.
        """
        if self.signal_number is not None:
            raise SystemExit(128 + self.signal_number)

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            # One that is ignored already stays so: nohup means to outlive its terminal.
            for number in (n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
        if number == signal.SIGHUP:
            _leave_terminal()
        # Not a print: the signal may have come in the middle of one.
        os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving\n".encode())


def _leave_terminal() -> None:
    """Print nowhere in the place of a terminal that is gone, where every print would fail."""
    for stream in (1, 2):
        if os.isatty(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
