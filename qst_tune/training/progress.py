"""The counters and random numbers of a run: a resumed run continues both."""

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch

from qst_tune.distributed.processes import rank_and_world_size
from qst_tune.training.monitor import Monitor
from qst_tune.training.state_file import State


@dataclass
class Progress:
    """Counters of a run.

    Random numbers and the position in the data are not among them: both are functions of the seed
    and the step (:func:`seed_step`, ``batches.py``).
    """

    step: int = 0  # optimizer steps done
    num_tokens: int = 0  # tokens seen by this process, padding included
    step_seconds: float = 0.0  # time spent in steps
    skipped_steps: int = 0  # steps whose gradients were not finite
    empty_steps: int = 0  # steps in which no row had a label
    best_step: int | None = None  # with the best validation so far; step 0 is not counted
    best_value: float | None = None  # the figure of that validation
    validations_since_best: int = 0  # how often a validation has not been the best since
    validated_step: int | None = None  # of the last validation

    def record(self, value: float, monitor: Monitor) -> bool:
        """Record the figure of a validation; returns whether it is the best so far."""
        is_best = monitor.is_better(value, self.best_value)
        if is_best:
            self.best_step, self.best_value, self.validations_since_best = self.step, value, 0
        else:
            self.validations_since_best += 1
        return is_best

    def describe_best(
        self, values: Mapping[int, float], monitor: Monitor, *, is_worse: bool
    ) -> str:
        """Describe, for people, the step that is exported.

        ``values`` are the monitored figures by step; ``is_worse``: training has improved nothing.
        """
        if self.best_step is None:
            return "the last step"
        best = values[self.best_step]
        if any(monitor.is_better(value, best) for value in values.values()):
            return "the best step whose checkpoint is not damaged"
        return "the best of the validated steps" if is_worse else "the best on the validation set"

    @classmethod
    def from_dict(cls, counters: State) -> "Progress":
        """Read the counters by name; ValueError for a type or value that none can have."""
        known = {field.name for field in fields(cls)}
        progress = cls(**{name: value for name, value in counters.items() if name in known})
        for name, value in asdict(progress).items():
            kind: type = float if name in ("step_seconds", "best_value") else int
            if value is None and name in ("best_step", "best_value", "validated_step"):
                continue
            is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            is_negative = is_number and value < 0 and name != "best_value"
            if not is_number or not math.isfinite(value) or is_negative:
                raise ValueError(f"progress.{name}={value!r}")
        if (progress.best_step or 0) > progress.step or (progress.best_step == 0):
            raise ValueError(f"progress.best_step={progress.best_step} of {progress.step} steps")
        return progress


class RandomState:
    """The state of all random number generators, taken when it is built."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        self.mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
        self.numpy = np.random.get_state()
        self.python = random.getstate()

    def restore(self) -> None:
        """Set all generators back to this state."""
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        if self.mps is not None:
            torch.mps.set_rng_state(self.mps)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def seed_step(seed: int, step: int) -> None:
    """Make the random numbers of a step, such as dropout's, a function of seed, step and process.

    A resumed run draws the same numbers as one that was never stopped, and no generator has to be
    saved. It takes about 50 microseconds.
    """
    words = np.random.SeedSequence([seed, step, rank_and_world_size()[0]]).generate_state(1)
    number = int(words[0])
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
