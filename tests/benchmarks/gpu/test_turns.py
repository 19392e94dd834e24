"""Methods take turns; a failure or the end of the time concerns one method alone."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu.clock import Clock, Deadline
from benchmarks.gpu.turns import NO_TIME, Held, Runner, take_turns

CLOCK = Clock(torch.device("cpu"))


def runner(name: str, step: Callable[[Any], object]) -> Runner:
    return Runner(name, lambda: Held(None, 0), lambda model: step)


def test_another_method_begins_each_round_and_the_first_round_is_not_timed() -> None:
    order: list[tuple[str, int]] = []
    runners = [runner(n, lambda value, n=n: order.append((n, value))) for n in "abc"]
    taken = take_turns(runners, [0, 1, 2], CLOCK, Deadline(60))
    assert order == [
        *(("a", 0), ("b", 0), ("c", 0)),
        *(("b", 1), ("c", 1), ("a", 1)),
        *(("c", 2), ("a", 2), ("b", 2)),
    ]
    assert all(len(times.milliseconds) == 2 and not times.error for times in taken.values())


def test_a_method_that_fails_leaves_the_others_alone_and_does_not_return() -> None:
    calls: list[int] = []

    def fails(value: int) -> None:
        calls.append(value)
        raise ImportError("No module named 'peer'\n  at once")

    runners = [runner("bad", fails), runner("good", lambda value: None)]
    for _ in range(2):
        taken = take_turns(runners, [0, 1, 2], CLOCK, Deadline(60))
        assert taken["bad"].error == "ImportError: No module named 'peer' at once"
        assert taken["bad"].milliseconds == []
        assert len(taken["good"].milliseconds) == 2
    assert calls == [0]


def test_a_method_without_memory_for_one_shape_is_asked_for_the_next() -> None:
    def needs(value: int) -> None:
        if value > 1:
            raise torch.OutOfMemoryError("too much")

    big = runner("big", needs)
    assert take_turns([big], [5, 5], CLOCK, Deadline(60))["big"].error
    assert len(take_turns([big], [1, 1], CLOCK, Deadline(60))["big"].milliseconds) == 1


def test_the_memory_of_graphs_is_counted_where_steps_replay_them() -> None:
    model = SimpleNamespace(captured_passes=SimpleNamespace(pool_bytes=lambda: 5000))

    def peak(**how: bool) -> int:
        graphs = Runner("graphs", lambda: Held(model, 100), lambda model: lambda value: None, **how)
        return take_turns([graphs], [0, 1], CLOCK, Deadline(60))["graphs"].peak_bytes

    assert (peak(), peak(replays=False)) == (5100, 100)


@pytest.mark.parametrize("seconds", [-1.0])
def test_no_step_begins_once_the_time_is_over(seconds: float) -> None:
    calls: list[int] = []
    taken = take_turns([runner("late", calls.append)], [0, 1], CLOCK, Deadline(seconds))
    assert taken["late"].error == NO_TIME
    assert not calls


class CountingClock(Clock):
    """A device whose memory is a number that models and steps change."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.now = self.most = 0

    def take(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)

    def allocated(self) -> int:
        return self.now

    def forget_peak(self) -> None:
        self.most = self.now

    def peak(self) -> int:
        return self.most


def test_a_peak_has_the_methods_own_weights_and_optimizer_and_nothing_of_the_others() -> None:
    clock = CountingClock()

    def method(name: str, weights: int, optimizer: int, activations: int) -> Runner:
        def hold() -> Held:
            clock.take(weights)
            return Held(None, weights)

        def make_step(model: Any) -> Callable[[Any], object]:
            steps: list[int] = []

            def step(value: int) -> None:
                clock.take(activations * value)
                clock.take(-activations * value)
                if not steps:  # as AdamW does at its first step
                    clock.take(optimizer)
                steps.append(value)

            return step

        return Runner(name, hold, make_step)

    runners = [method("a", 1000, 100, 10), method("b", 5000, 300, 50)]
    taken = take_turns(runners, [1, 1, 2], clock, Deadline(60))
    assert taken["a"].peak_bytes == 1000 + 100 + 2 * 10
    assert taken["b"].peak_bytes == 5000 + 300 + 2 * 50
    assert [runner.own_bytes for runner in runners] == [1100, 5300]
