"""The answer to a question about one method: memory of a step, and the largest batch that fits."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from qst_tune.config.schema import StepConfig
from qst_tune.estimation.batch_peaks import BatchPeaks
from qst_tune.estimation.depth import Shorten
from qst_tune.estimation.fake_device import Attention, DeviceType
from qst_tune.estimation.largest_batch import largest_batch
from qst_tune.estimation.report import Row
from qst_tune.estimation.setup import ALL_ROWS, Setup, Shape
from qst_tune.estimation.spread import Spread, spread_line
from qst_tune.estimation.step import StepCost, trace_step
from qst_tune.estimation.tracker import Timeline
from qst_tune.modules.memory import GIB

ONE_PROCESS = Spread(1, None)


@dataclass(frozen=True)
class Question:
    """What is asked about a step that ``build`` makes anew at each call.

    ``cfg`` has ``optimizer``. With ``fit_gib`` the largest batch within that memory is asked too.
    """

    build: Callable[[], Setup]
    cfg: StepConfig
    shape: Shape
    device: DeviceType
    attention: Attention = "fused"
    spread: Spread = ONE_PROCESS
    fit_gib: float | None = None

    def answer(self) -> tuple[Row, str | None]:
        """Run the step on fake tensors: a row of the table, a line about several processes."""
        setup = self.build()
        with _quick_collections(), warnings.catch_warnings():
            # By torch, of torchtune's own norms, whose weights are bf16 and inputs fp32.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            cost, timeline = self._trace(self.shape.batch_size)
            batch = self._largest_batch(setup, timeline) if self.fit_gib else None
        line = None
        if self.spread.num_processes > 1:
            line = spread_line(self.spread, setup.model, cost.memory.num_bytes)
        return Row(setup.title, cost, batch), line

    def _trace(self, batch_size: int, shorten: Shorten | None = None) -> tuple[StepCost, Timeline]:
        return trace_step(
            self.build(),
            self.cfg,
            Shape(batch_size, self.shape.seq_len),
            device=self.device,
            attention=self.attention,
            shorten=shorten,
        )

    def _largest_batch(self, setup: Setup, timeline: Timeline) -> int:
        assert self.fit_gib is not None

        def of_a_process(num_bytes: int) -> int:
            return self.spread.peak_bytes(setup.model, num_bytes)

        fixed, limit = of_a_process(timeline.start_bytes), self.fit_gib * GIB
        if fixed > limit:
            return 0
        part_rows = setup.part_rows(self.shape.seq_len)
        peaks = BatchPeaks(
            setup.model,
            lambda batch_size, shorten: self._trace(batch_size, shorten)[1],
            self.shape.batch_size,
            timeline,
            part_rows,
        )
        return largest_batch(
            lambda batch_size: of_a_process(peaks(batch_size)),
            limit,
            start=self.shape.batch_size,
            fixed_bytes=fixed,
            step=part_rows if part_rows < ALL_ROWS else 1,
        )


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Collect only what the block makes: 0.2 s less a step, since torch has a million objects."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
