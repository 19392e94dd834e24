"""Step times, interleaved: in each round every method takes one step on the same batch."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.backbones import DTYPE, Backbone
from benchmarks.methods import METHODS, Batch, Trainee, random_batch

_LIMIT_SIZE = 2048


@dataclass(frozen=True, order=True)
class Shape:
    """Size of one batch.

    Args:
        batch_size (int): rows.
        num_tokens (int): tokens a row.
    """

    batch_size: int
    num_tokens: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read ``4x512``.

        Args:
            text (str): rows, an x, tokens a row.

        Returns:
            Shape: the size.

        Raises:
            ValueError: if it is something else.
        """
        rows, _, tokens = text.partition("x")
        if not (rows.isdigit() and tokens.isdigit() and int(rows) and int(tokens)):
            raise ValueError(f"shape {text!r} must look like 4x512: rows x tokens a row")
        return cls(int(rows), int(tokens))

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.num_tokens}"

    @property
    def total(self) -> int:
        """Tokens in the batch."""
        return self.batch_size * self.num_tokens


@dataclass(frozen=True)
class Round:
    """One step of each method, taken one after another.

    Args:
        seconds (dict[str, float]): step time by method.
        losses (dict[str, float]): loss by method; a check that they do the same work.
        limit_gflops (float): speed of a big matrix product on this machine, just before.
    """

    seconds: dict[str, float]
    losses: dict[str, float]
    limit_gflops: float


class Interleaved:
    """All methods alive at once, to take steps by turns.

    Args:
        names (list[str]): keys of :data:`~benchmarks.methods.METHODS`.
        backbone (Backbone): what they train.
        report (Callable[[str], None]): is told what goes on.
    """

    def __init__(
        self, names: list[str], backbone: Backbone, report: Callable[[str], None] = print
    ) -> None:
        self._backbone = backbone
        self._trainees: dict[str, Trainee] = {}
        self._warm: set[str] = set()
        for name in names:
            key = METHODS[name].model
            if key not in self._trainees:
                start = time.perf_counter()
                self._trainees[key] = METHODS[name].build(backbone)
                report(f"built {key} in {time.perf_counter() - start:.1f} s")

    def warm_up(self, names: list[str], shape: Shape) -> None:
        """Take one step of each method that has taken none: optimizer states come to be.

        Args:
            names (list[str]): methods.
            shape (Shape): of the batch.
        """
        batch = self._batch(shape, seed=0)
        for name in names:
            if name not in self._warm:
                self._timed_step(name, batch)
                self._warm.add(name)

    def rounds(self, names: list[str], shape: Shape, numbers: range) -> Iterator[Round]:
        """Measure.

        Args:
            names (list[str]): methods.
            shape (Shape): of the batches.
            numbers (range): of the rounds; a number fixes the batch and who goes first.

        Yields:
            Round: as it is done.
        """
        for number in numbers:
            yield self._round(names, shape, number)

    def _round(self, names: list[str], shape: Shape, number: int) -> Round:
        gc.collect()
        limit = matmul_gflops()
        batch = self._batch(shape, seed=1 + number)
        first = number % len(names)
        in_turn = names[first:] + names[:first]
        steps = {name: self._timed_step(name, batch) for name in in_turn}
        return Round(
            seconds={name: steps[name][0] for name in names},
            losses={name: steps[name][1] for name in names},
            limit_gflops=limit,
        )

    def _timed_step(self, name: str, batch: Batch) -> tuple[float, float]:
        method = METHODS[name]
        trainee = self._trainees[method.model]
        with method.running(trainee), _no_garbage_collection():
            start = time.perf_counter()
            loss = trainee.step(batch)
            return time.perf_counter() - start, loss

    def _batch(self, shape: Shape, seed: int) -> Batch:
        return random_batch(self._backbone, shape.batch_size, shape.num_tokens, seed)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collecting takes 0.6 s with a dozen models alive, and would hit one step or another."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def matmul_gflops(size: int = _LIMIT_SIZE, repeats: int = 4) -> float:
    """Measure the machine's own limit: the best speed of a big bf16 matrix product.

    Args:
        size (int): of the square matrices.
        repeats (int): products; the first warms up.

    Returns:
        float: 1e9 floating-point operations a second.
    """
    a, b = torch.randn(size, size, dtype=DTYPE), torch.randn(size, size, dtype=DTYPE)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:]) / 1e9
