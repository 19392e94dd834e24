"""Methods that take steps by turns on the same batches, so that a slow minute slows all alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.clock import Clock, Deadline

NO_TIME = "not measured: the section's time was over"
Step = Callable[[Any], object]


@dataclass(frozen=True)
class Held:
    """A model, and the bytes that it holds."""

    model: Any
    num_bytes: int


@dataclass
class Runner:
    """One method. Its first turn builds the model and the step, so that a failure is its own.

    ``own_bytes`` are those that it holds between its steps: weights and optimizer. What the other
    methods hold is not counted in its peak. ``replays`` says that its steps may be CUDA graphs.
    """

    method: str
    hold: Callable[[], Held]
    make_step: Callable[[Any], Step]
    replays: bool = True
    step: Step | None = None
    model: Any = None
    own_bytes: int = 0
    error: str | None = None

    def prepare(self, clock: Clock) -> Step:
        """Return the step, made once."""
        if self.step is None:
            held = self.hold()
            self.model = held.model
            before = clock.allocated()
            self.step = self.make_step(held.model)
            self.own_bytes = held.num_bytes + clock.allocated() - before
        return self.step

    def graph_bytes(self) -> int:
        """Memory of its graphs, which a replay uses without allocating it."""
        passes = getattr(self.model, "captured_passes", None) if self.replays else None
        return 0 if passes is None else passes.pool_bytes()


@dataclass
class Times:
    """What the turns of one method took; the peak includes the turn that warms up."""

    milliseconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    error: str | None = None


def take_turns(
    runners: Sequence[Runner], inputs: Sequence[Any], clock: Clock, deadline: Deadline
) -> dict[str, Times]:
    """Let each method take a step of each input; the first warms up, and is not timed.

    Another method begins each round. One that fails takes no further turn here. Once the time is
    over, each only finishes its first timed step.
    """
    taken = {runner.method: Times(error=runner.error) for runner in runners}
    clock.collect()
    for number, value in enumerate(inputs):
        first = number % len(runners)
        for runner in [*runners[first:], *runners[:first]]:
            times = taken[runner.method]
            if deadline.is_over and number == 0:
                times.error = times.error or NO_TIME
            is_enough = deadline.is_over and bool(times.milliseconds)
            if times.error is None and not is_enough:
                _turn(runner, value, times, clock, is_timed=number > 0)
    return taken


def _turn(runner: Runner, value: Any, times: Times, clock: Clock, *, is_timed: bool) -> None:
    """Take one step, and note its time, its peak or why it failed."""
    before = clock.allocated()
    try:
        step = runner.prepare(clock)
        before, graph_bytes = clock.allocated(), runner.graph_bytes()
        clock.forget_peak()
        milliseconds = clock.milliseconds(lambda: step(value))
        peak_bytes = clock.peak() - before + runner.own_bytes + graph_bytes
        times.peak_bytes = max(times.peak_bytes, peak_bytes)
        if is_timed:
            times.milliseconds.append(milliseconds)
    except Exception as error:  # whatever it is: the others go on
        times.error = one_line(error)
        if not isinstance(error, torch.OutOfMemoryError):
            runner.error = times.error
    if times.error is not None:
        clock.collect()
    runner.own_bytes += clock.allocated() - before


def one_line(error: BaseException) -> str:
    """Describe an error in a short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]
