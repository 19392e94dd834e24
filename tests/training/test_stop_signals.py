"""Ctrl-C and kill are a wish that waits for the end of the step."""

import os
import signal
import threading

import pytest

from qst_tune.training.stop_signals import SIGNALS as KINDS
from qst_tune.training.stop_signals import StopSignals


@pytest.mark.parametrize("kind", KINDS)
def test_signal_is_taken_note_of_and_reported(
    kind: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopSignals() as stop:
        assert not stop.requested
        stop.exit_if_requested()
        os.kill(os.getpid(), kind)
        assert stop.requested
        assert stop.name == kind.name
    assert capfd.readouterr().err == f"\n{kind.name}: finishing this step, then saving\n"
    with pytest.raises(SystemExit) as left:
        stop.exit_if_requested()
    assert left.value.code == 128 + kind


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(kind) for kind in KINDS]
    with pytest.raises(ZeroDivisionError), StopSignals():
        1 / 0  # noqa: B018
    assert [signal.getsignal(kind) for kind in KINDS] == before


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_second_interrupt_does_not_wait() -> None:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat itself
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_another_process_can_have_got_the_signal() -> None:
    stop = StopSignals()
    stop.request()
    assert stop.name == "SIGTERM"


def test_in_a_thread_no_handler_is_set() -> None:
    seen = []

    def enter() -> None:
        with StopSignals() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]
