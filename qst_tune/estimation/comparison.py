"""The rows of an estimate, each a method of its own: several at once on several cores."""

import gc
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

from qst_tune.estimation.batch_peaks import BatchPeaks
from qst_tune.estimation.depth import Shorten
from qst_tune.estimation.fake_device import Attention, DeviceType
from qst_tune.estimation.largest_batch import largest_batch
from qst_tune.estimation.methods import METHODS, Choices, Method
from qst_tune.estimation.report import Row
from qst_tune.estimation.spread import Spread, spread_line
from qst_tune.estimation.step import Shape, StepCost, trace_step
from qst_tune.estimation.tracker import Timeline
from qst_tune.modules.peqa_decoder import PEQADecoder
from qst_tune.modules.qst_model import QSTModel
from qst_tune.training.memory import GIB

# A process takes 4 s to import torch, which one or two methods do not earn back.
_FEW = 2

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Question:
    """What is asked of every method.

    Args:
        choices (Choices): config and what else the comparison fixes.
        shape (Shape): of the batch.
        device (DeviceType): the device to imitate.
        attention (Attention): kind of attention kernel.
        spread (Spread): over how many processes.
        fit_gib (float | None): look for the largest batch within so much memory; None: do not.
    """

    choices: Choices
    shape: Shape
    device: DeviceType
    attention: Attention
    spread: Spread
    fit_gib: float | None

    def row(self, name: str) -> tuple[Row, str | None]:
        """Estimate one method.

        Args:
            name (str): key of ``METHODS``.

        Returns:
            tuple[Row, str | None]: of the table, and what each of several processes has of it.
        """
        # Said once by torch of torchtune's own norms, whose weights are bf16 and inputs fp32.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        method = METHODS[name]
        with _quick_collections():
            cost, timeline = self._trace(method, self.shape.batch_size)
            batch = self._largest_batch(method, timeline) if self.fit_gib else None
        return Row(method.title, cost, batch), self._spread_line(name, method, cost)

    def _trace(
        self, method: Method, batch_size: int, shorten: Shorten | None = None
    ) -> tuple[StepCost, Timeline]:
        return trace_step(
            method,
            self.choices,
            Shape(batch_size, self.shape.seq_len),
            device=self.device,
            attention=self.attention,
            shorten=shorten,
        )

    def _spread_line(self, name: str, method: Method, cost: StepCost) -> str | None:
        """Nothing for one process or others' methods."""
        if self.spread.num_processes == 1:
            return None
        model = method.build(self.choices).model
        if not isinstance(model, QSTModel | PEQADecoder):
            return None
        return f"{name}, {spread_line(self.spread, model, cost.memory.num_bytes)}"

    def _largest_batch(self, method: Method, timeline: Timeline) -> int:
        assert self.fit_gib is not None

        model = method.build(self.choices).model

        def of_a_process(num_bytes: int) -> int:
            is_ours = isinstance(model, QSTModel | PEQADecoder)
            return self.spread.peak_bytes(model, num_bytes) if is_ours else num_bytes

        fixed, limit = of_a_process(timeline.start_bytes), self.fit_gib * GIB
        if fixed > limit:
            return 0
        peaks = BatchPeaks(
            model,
            lambda batch_size, shorten: self._trace(method, batch_size, shorten)[1],
            self.shape.batch_size,
            timeline,
        )
        return largest_batch(
            lambda batch_size: of_a_process(peaks(batch_size)),
            limit,
            start=self.shape.batch_size,
            fixed_bytes=fixed,
        )


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Collect only what the block makes: 0.2 s less a step, since torch has a million objects."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def estimate_rows(question: Question, names: Sequence[str]) -> dict[str, tuple[Row, str | None]]:
    """Estimate methods, with a progress bar.

    Args:
        question (Question): what is asked of each.
        names (Sequence[str]): keys of ``METHODS``.

    Returns:
        dict[str, tuple[Row, str | None]]: by name, in the order asked for.
    """
    found = {}
    with tqdm(total=len(names), desc="estimating", unit="method", leave=False) as bar:
        for name, result in _results(question.row, names):
            found[name] = result
            bar.set_postfix_str(name)
            bar.update()
    return {name: found[name] for name in names}


def _results(work: Callable[[str], ResultT], names: Sequence[str]) -> Iterator[tuple[str, ResultT]]:
    """Results as they come, from one process a core where that pays."""
    workers = min(os.cpu_count() or 1, len(names))
    if workers == 1 or len(names) <= _FEW:
        yield from ((name, work(name)) for name in names)
        return
    # Not fork: torch's autograd refuses to run in a fork of a process that has used it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending = {pool.submit(work, name): name for name in names}
        try:
            for future in as_completed(pending):
                yield pending[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
