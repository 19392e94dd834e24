"""What the sections share: a device, its clock, the sizes, and models that are built once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.clock import GIB, Clock, Deadline, tflops
from benchmarks.gpu.methods import METHODS
from benchmarks.gpu.random_weights import RandomWeights
from benchmarks.gpu.sizes import FULL, TINY, Shape
from benchmarks.gpu.turns import NO_TIME, Held, Runner, Step, Times, one_line, take_turns
from benchmarks.methods import Batch, random_batch

Row = dict[str, Any]
Run = Callable[[], object]


class Bench:
    """One run on one device."""

    def __init__(self, *, tiny: bool, rounds: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sizes = TINY if tiny else FULL
        self.rounds = rounds
        self.clock = Clock(self.device)
        self.weights = RandomWeights(self.device)
        self.deadline = Deadline(0)
        self._models: dict[str, Held] = {}
        self._trainees: dict[str, Runner] = {}

    @cached_property
    def tflops(self) -> float:
        """Speed of a plain product on this card, 1e12 operations a second."""
        return tflops(self.clock, self.sizes.largest_product)

    def begin(self, seconds: float) -> None:
        """Begin a section that may take so long."""
        self.deadline = Deadline(seconds)
        self.clock.collect()

    def model(self, method: str) -> Held:
        """Return the model of a method, built once for all sections."""
        if method not in self._models:
            before = self.clock.allocated()
            model = METHODS[method].build(self.sizes.backbone, self.weights)
            self._models[method] = Held(model, self.clock.allocated() - before)
        return self._models[method]

    def runner(
        self, method: str, make_step: Callable[[Any], Step], model: str, *, replays: bool = True
    ) -> Runner:
        """Return a method that takes such steps with the model of another, or its own."""
        return Runner(method, partial(self.model, model), make_step, replays)

    def trainee(self, method: str) -> Runner:
        """Return the one runner that trains the model of a method."""
        if method not in self._trainees:
            self._trainees[method] = self.runner(method, METHODS[method].train, method)
        return self._trainees[method]

    def forget(self, *methods: str) -> None:
        """Free the models of some methods, with their optimizers."""
        for method in methods:
            self._trainees.pop(method, None)
            self._models.pop(method, None)
        self.clock.collect()

    def batch(self, shape: Shape, seed: int = 0) -> Batch:
        """Draw a batch on the device."""
        batch = random_batch(self.sizes.backbone, *shape, seed=seed)
        return {name: value.to(self.device) for name, value in batch.items()}

    def steps(
        self, section: str, runners: Sequence[Runner], shape: Shape, rounds: int
    ) -> list[Row]:
        """Let methods take steps by turns on batches of one shape."""
        batches = [self.batch(shape, seed) for seed in range(1 + rounds)]
        taken = take_turns(runners, batches, self.clock, self.deadline)
        text = f"{shape[0]} x {shape[1]}"
        return [self.row(section, method, text, times) for method, times in taken.items()]

    def row(self, section: str, method: str, shape: str, times: Times) -> Row:
        """Describe what one method took."""
        row: Row = {"section": section, "method": method, "shape": shape}
        if times.milliseconds:
            row["ms"] = round(median(times.milliseconds), 3)
            row["least_ms"] = round(min(times.milliseconds), 3)
            row["rounds"] = len(times.milliseconds)
        if self.clock.is_cuda:
            row["peak_gib"] = round(times.peak_bytes / GIB, 3)
        return row if times.error is None else {**row, "error": times.error}

    def kernels(
        self, section: str, shape: str, makers: Mapping[str, Callable[[], Run]], **more: Any
    ) -> Iterator[Row]:
        """Time calls on the device alone: what each maker returns; one that fails gives its error.

        ``extra_mib`` is the most that a call allocates, its result included.
        """
        for method, make in makers.items():
            row: Row = {"section": section, "method": method, "shape": shape, **more}
            try:
                if self.deadline.is_over:
                    raise TimeoutError(NO_TIME)
                row |= self._kernel(make())
            except Exception as error:  # whatever it is: the others go on
                row["error"] = one_line(error)
            yield row

    def _kernel(self, run: Run) -> Row:
        run()  # compiles
        before = self.clock.allocated()
        self.clock.forget_peak()
        run()
        extra = self.clock.peak() - before
        row: Row = {"ms": round(self.clock.kernel_milliseconds(run), 4)}
        if self.clock.is_cuda:
            row["extra_mib"] = round(extra / 2**20)
        return row
