"""The rows of an estimate, each a method of its own: several at once on several cores."""

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

from qst_tune.estimation.fake_device import Attention, DeviceType
from qst_tune.estimation.largest_batch import LargestBatch, largest_batch
from qst_tune.estimation.methods import METHODS, Choices, Method
from qst_tune.estimation.report import Row
from qst_tune.estimation.spread import Spread, spread_line
from qst_tune.estimation.step import Shape, StepCost, estimate_step
from qst_tune.modules.peqa_decoder import PEQADecoder
from qst_tune.modules.qst_model import QSTModel
from qst_tune.training.memory import GIB

# Of the batches tried for fit_gib: the time of a trial grows with them.
MAX_TRIAL_TOKENS = 65_536
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
        cost = self._cost(method, self.shape)
        batch = self._largest_batch(method, cost) if self.fit_gib else None
        return Row(method.title, cost, batch), self._spread_line(name, method, cost)

    def _cost(self, method: Method, shape: Shape) -> StepCost:
        return estimate_step(
            method, self.choices, shape, device=self.device, attention=self.attention
        )

    def _spread_line(self, name: str, method: Method, cost: StepCost) -> str | None:
        """Nothing for one process or others' methods."""
        if self.spread.num_processes == 1:
            return None
        model = method.build(self.choices).model
        if not isinstance(model, QSTModel | PEQADecoder):
            return None
        return f"{name}, {spread_line(self.spread, model, cost.memory.num_bytes)}"

    def _largest_batch(self, method: Method, cost: StepCost) -> LargestBatch:
        assert self.fit_gib is not None

        model = method.build(self.choices).model if self.spread.is_sharded else None
        known = {self.shape.batch_size: cost}

        def peak_bytes(batch_size: int) -> int:
            shape = Shape(batch_size, self.shape.seq_len)
            peak = (known.get(batch_size) or self._cost(method, shape)).memory.num_bytes
            is_ours = isinstance(model, QSTModel | PEQADecoder)
            return self.spread.peak_bytes(model, peak) if is_ours else peak

        return largest_batch(
            peak_bytes,
            self.fit_gib * GIB,
            start=self.shape.batch_size,
            max_trial=MAX_TRIAL_TOKENS // self.shape.seq_len,
        )


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
