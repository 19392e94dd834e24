"""Several runs over one frozen backbone, which take turns at each batch."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tqdm import tqdm

from qst_tune.config.trials import Halving, Settings
from qst_tune.distributed.processes import is_main_process
from qst_tune.errors import UserError
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.shared_pass import SharedPass
from qst_tune.modules.side.network import SideNetwork
from qst_tune.training.progress import RandomState
from qst_tune.training.stop_signals import StopSignals
from qst_tune.training.task import GivenUp, Passes, T, Turn, Turns
from qst_tune.training.trainer import Trainer


@dataclass
class Trial:
    """A run that trains a side network of its own; trials take turns in one shared model.

    ``reference`` is the side network that preference learning compares it with.
    """

    number: int
    settings: Settings  # what differs from the other trials
    trainer: Trainer
    side: SideNetwork
    reference: SideNetwork | None = None

    place: Turn | None = field(default=None, init=False)  # its next pass; None: it has ended
    error: UserError | None = field(default=None, init=False)
    given_up: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.turns: Turns[None] = self.trainer.turns()
        self._is_training = True
        self._random = RandomState()
        self._since: float | None = None

    def take_turn(self, model: QSTModel) -> None:
        """Run until the next pass through the backbone, or to the end."""
        self._advance(model, lambda: next(self.turns))

    def give_up(self, model: QSTModel, reason: str) -> None:
        """End the run here; it saves and exports its result."""
        self.given_up = reason
        self._advance(model, lambda: self.turns.throw(GivenUp(reason)))

    def _advance(self, model: QSTModel, step: Callable[[], Turn]) -> None:
        with self._in(model):
            try:
                self.place = step()
            except StopIteration:
                self.place = None
            except UserError as error:
                self.place, self.error = None, error

    @contextmanager
    def _in(self, model: QSTModel) -> Iterator[None]:
        """Put the side network into the model, with mode and random numbers of its last turn."""
        use_side(model, self.side, self.reference)
        model.training = self._is_training
        self._random.restore()
        if self._since is not None:
            self.trainer.seconds_waited += time.perf_counter() - self._since
        yield
        self._is_training, self._random = model.training, RandomState()
        self._since = time.perf_counter()


def use_side(model: QSTModel, side: SideNetwork, reference: SideNetwork | None = None) -> None:
    """Put a side network and its reference into a model."""
    model.side = side
    object.__setattr__(model, "reference_side", reference)


def read_in_turn(
    model: QSTModel,
    sides: Sequence[tuple[SideNetwork, SideNetwork | None]],
    start: Callable[[], Passes[T]],
) -> list[T]:
    """Run the same passes with each side network and its reference; return each one's result.

    A batch goes through the frozen layers once for all of them.
    """
    before = model.side, model.reference_side
    shared = model.shared_pass = SharedPass([side for side, _ in sides])
    waiting = {number: start() for number in range(len(sides))}
    found: dict[int, T] = {}
    try:
        while waiting:
            shared.begin(len(waiting))
            for number, passes in list(waiting.items()):
                use_side(model, *sides[number])
                try:
                    next(passes)
                except StopIteration as end:
                    found[number] = end.value
                    del waiting[number]
    finally:
        model.shared_pass = None
        use_side(model, *before)
    return [found[number] for number in range(len(sides))]


def take_turns(model: QSTModel, trials: Sequence[Trial], halving: Halving | None) -> StopSignals:
    """Run all trials to their ends, side by side: those that are furthest behind go first.

    A batch goes through the frozen layers once for all trials that have reached it. A trial whose
    loss is not finite, or that is given up, ends alone. Returns the signals, which all trials
    share. UserError if every trial has failed.
    """
    shared = model.shared_pass = SharedPass([trial.side for trial in trials])
    halving_steps = _halving_steps(trials, halving)
    stop = StopSignals()
    bar = tqdm(
        total=sum(trial.trainer.schedule.num_steps for trial in trials),
        initial=_steps(trials),
        desc=f"{len(trials)} trials",
        disable=not is_main_process(),
    )
    for trial in trials:
        trial.trainer.stop = stop
    try:
        with stop, bar:
            for trial in trials:
                trial.take_turn(model)
            while waiting := [trial for trial in trials if trial.place is not None]:
                place = min(trial.place for trial in waiting if trial.place is not None)
                while halving_steps and place >= (halving_steps[0], 1, 0):
                    _give_up_worst(model, trials, halving_steps.pop(0), halving)
                bar.update(_steps(trials) - bar.n)
                here = [trial for trial in waiting if trial.place == place]
                shared.begin(len(here))
                for trial in here:
                    trial.take_turn(model)
    finally:
        model.shared_pass = None
        for trial in trials:
            trial.turns.close()
    errors = [trial.error for trial in trials if trial.error is not None]
    if len(errors) == len(trials):
        raise errors[0]
    return stop


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that have validated and not failed, the best first, of equals the first."""
    monitor = trials[0].trainer.task.monitor
    valid = [t for t in trials if t.error is None and t.trainer.progress.best_value is not None]
    return sorted(valid, key=lambda trial: monitor.rank(trial.trainer.progress.best_value))


def _steps(trials: Sequence[Trial]) -> int:
    return sum(trial.trainer.progress.step for trial in trials)


def _halving_steps(trials: Sequence[Trial], halving: Halving | None) -> list[int]:
    """The steps after which trials are given up."""
    longest = max(trial.trainer.schedule.num_steps for trial in trials)
    return [] if halving is None else halving.steps(longest)


def _give_up_worst(
    model: QSTModel, trials: Sequence[Trial], step: int, halving: Halving | None
) -> None:
    """Give up the trials that are not among the best of those still running at a step."""
    going = [trial for trial in trials if trial.place is not None and trial.place[0] >= step]
    if halving is None or not going:
        return
    monitor = going[0].trainer.task.monitor
    # A figure that was not finite is not there.
    values = {trial.number: trial.trainer.validated().get(step, math.nan) for trial in going}
    num_kept = math.ceil(len(going) / halving.factor)
    kept = sorted(values, key=lambda number: (monitor.rank(values[number]), number))[:num_kept]
    for trial in going:
        if trial.number not in kept:
            value = f"{monitor.name} {values[trial.number]:.4f}"
            trial.give_up(model, f"{value} is not among the {num_kept} best of {len(going)}")
