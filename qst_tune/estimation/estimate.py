"""The estimate of one method: memory of a step, and the largest batch that fits; for people."""

import gc
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

from qst_tune.backbone.transformers import CHUNK_TOKENS
from qst_tune.config.schema import StepConfig
from qst_tune.estimation.batch_peaks import BatchPeaks, Shorten
from qst_tune.estimation.fake_device import Attention, DeviceType
from qst_tune.estimation.skipped_layers import skip, stand_ins, with_skipped
from qst_tune.estimation.spread import Spread, spread_line
from qst_tune.estimation.step import ALL_ROWS, Setup, Shape, StepCost, trace_step
from qst_tune.estimation.tracker import PARTS, Timeline
from qst_tune.modules.memory import GIB
from qst_tune.training.preference import PreferenceTask

JSON_FILE = "estimate.json"
# Taken where tokenizer.max_seq_len is null, since rows are then as long as the data.
DEFAULT_SEQ_LEN = 512
ONE_PROCESS = Spread(1, None)
# Taken for any number where rows run a few at a time, since more of them take no more memory.
MANY_ROWS = 1000
_TOKEN_BYTES = 16  # the id and the label of one token
_COLUMNS = ["peak", "frozen", "trained", "optimizer", "gradients", "saved", "loss", "transient"]


@dataclass(frozen=True)
class Row:
    """One method: its title, a step's cost, and the rows that fit into the memory asked about.

    ``at_once``: rows that run forward and backward before the next ones do, where not all do.
    """

    title: str
    cost: StepCost
    largest_batch: int | None = None
    at_once: int | None = None


@dataclass(frozen=True)
class Price:
    """What a step costs with LoRA in the last ``lora_layers`` layers.

    ``forwards`` are its operations over those of one pass forward.
    """

    lora_layers: int
    peak_bytes: int
    trainable_parameters: int
    forwards: float


@dataclass(frozen=True)
class EstimateRequest:
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
        with quick_and_quiet():
            cost, timeline = self._trace(self.shape.batch_size)
            batch = None if self.fit_gib is None else self._largest_batch(setup, timeline)
        line = None
        if self.spread.num_processes > 1:
            pairs = isinstance(setup.task, PreferenceTask)
            peak = cost.memory.num_bytes
            line = spread_line(self.spread, setup.model, peak, has_reference=pairs)
        return Row(setup.title, cost, batch, setup.rows_at_once(self.shape.seq_len)), line

    def price(self, forward_flops: float) -> Price:
        """Run the step of a QST model with one layer of each kind; ``forward_flops`` a token."""
        setup = self.build()
        skipped = stand_ins(setup.model)
        cost, step = self._trace(self.shape.batch_size, partial(skip, layers=list(skipped)))
        whole = with_skipped(step, skipped)
        return Price(
            setup.model.side.config.lora_layers,
            self.spread.peak_bytes(setup.model, max(whole.peaks())),
            cost.trainable_parameters,
            cost.flops_per_token * whole.flops / step.flops / forward_flops,
        )

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
        def of_a_process(num_bytes: int) -> int:
            return self.spread.peak_bytes(setup.model, num_bytes)

        fixed, limit = of_a_process(timeline.start_bytes), (self.fit_gib or 0) * GIB
        if fixed > limit:
            return 0
        at_once = setup.rows_at_once(self.shape.seq_len)
        with patch.dict(CHUNK_TOKENS, cpu=CHUNK_TOKENS[self.device]):
            part_rows = ALL_ROWS if at_once else setup.part_rows(self.shape.seq_len)
        peaks = BatchPeaks(
            setup.model,
            lambda batch_size, shorten: self._trace(batch_size, shorten)[1],
            self.shape.batch_size,
            timeline,
            part_rows,
        )

        def peak(batch_size: int) -> int:
            return of_a_process(peaks(batch_size))

        if at_once:
            start, seq_len = self.shape.batch_size, self.shape.seq_len
            return largest_batch_in_turn(peak, limit, start=start, at_once=at_once, seq_len=seq_len)
        return largest_batch(
            peak,
            limit,
            start=self.shape.batch_size,
            fixed_bytes=fixed,
            step=part_rows if part_rows < ALL_ROWS else 1,
        )


def batch_text(largest: int | None, at_once: int | None) -> str:
    """Report the largest batch, and the rows of it that run at once unless all do."""
    if at_once and largest == MANY_ROWS:
        return f"any size ({at_once} rows at a time)"
    return str(largest or "none")


@contextmanager
def quick_and_quiet() -> Iterator[None]:
    """Collect only what the block makes: 0.2 s less a step, since torch has a million objects."""
    gc.freeze()
    try:
        with warnings.catch_warnings():
            # By torch, of torchtune's own norms, whose weights are bf16 and inputs fp32.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            yield
    finally:
        gc.unfreeze()


def last_that_fits(peak: Callable[[int], int], limit: float, low: int, high: int) -> int:
    """Find the largest number within a limit, between one that fits and one that does not."""
    width = 2 * (high - low)
    while high - low > 1:
        guess = min(max(_crossing(peak, limit, low, high), low + 1), high - 1)
        if high - low > width / 2:  # where memory bends, lines lead on slowly
            guess = (low + high) // 2
        width = high - low
        low, high = (guess, high) if peak(guess) <= limit else (low, guess)
    return low


def _crossing(peak: Callable[[int], int], limit: float, first: int, second: int) -> int:
    """Largest number at which the line through two known peaks is within the limit."""
    slope = (peak(second) - peak(first)) / (second - first)
    if slope <= 0:  # something else is the peak
        return 2 * second
    return first + int((limit - peak(first)) / slope)


def largest_batch_in_turn(
    peak: Callable[[int], int], limit: float, *, start: int, at_once: int, seq_len: int
) -> int:
    """As :func:`largest_batch`, of rows that run ``at_once`` at a time: ``MANY_ROWS`` is any.

    More than two such parts add their tokens alone.
    """
    two = 2 * at_once
    if peak(two) + MANY_ROWS * seq_len * _TOKEN_BYTES <= limit:
        return MANY_ROWS
    if start < two and peak(start) <= limit < peak(two):
        return last_that_fits(peak, limit, start, two)
    return largest_batch(peak, limit, start=min(start, two))


def largest_batch(
    peak_bytes: Callable[[int], int],
    limit_bytes: float,
    *,
    start: int,
    fixed_bytes: int = 0,
    step: int = 1,
) -> int:
    """Find the largest number of rows within a limit; 0 if not even one fits.

    It is the same as of trying every batch size, since one more row never takes less memory; which
    is nearly affine in their number, so few trials are needed. ``peak_bytes`` is of a step with so
    many rows, ``start`` a batch size to begin with, ``fixed_bytes`` about what no row adds to, and
    multiples of ``step``, for which ``peak_bytes`` is quick, are tried first.
    """
    peak = cache(peak_bytes)

    crossing = partial(_crossing, peak, limit_bytes)

    def between(low: int, high: int) -> int:
        return last_that_fits(peak, limit_bytes, low, high)

    if step > 1:
        known = {"start": max(1, start // step), "fixed_bytes": fixed_bytes}
        full = step * largest_batch(lambda n: peak(n * step), limit_bytes, **known)
        if full and peak(full) <= limit_bytes < peak(full + step):
            return between(full, full + step)
        start = min(start, step)
    if peak(start) > limit_bytes:
        return between(1, start) if start > 1 and peak(1) <= limit_bytes else 0
    a_row = max(1.0, (peak(start) - fixed_bytes) / start)
    low, high = start, start + max(1, int((limit_bytes - peak(start)) / a_row))
    while peak(high) <= limit_bytes:
        low, high = high, max(crossing(low, high), high + 1)
    return between(low, high)


def table(rows: Sequence[Row]) -> str:
    """Lay an estimate out as aligned text; memory in GiB, the parts of a row add up to its peak."""
    width = max(len("method"), *(len(row.title) for row in rows))
    names = "".join(f"{name:>10}" for name in _COLUMNS)
    lines = [f"{'method':{width}}{names}  {'peak in':13}{'trained, M':>11}{'GFLOP/token':>13}"]
    for row in rows:
        memory = row.cost.memory
        sizes = [memory.num_bytes, *(memory.parts[part] for part in PARTS)]
        lines.append(
            f"{row.title:{width}}"
            + "".join(f"{size / GIB:10.2f}" for size in sizes)
            + f"  {memory.phase:13}{row.cost.trainable_parameters / 1e6:11.1f}"
            + f"{row.cost.flops_per_token / 1e9:13.2f}"
        )
    return "\n".join(lines)


def write(
    directory: Path, row: Row, settings: Mapping[str, object], more: Mapping[str, object]
) -> None:
    """Write ``estimate.json``: the row, what it is for, and further figures."""
    content = {
        "unit": "bytes; GiB = 2^30 bytes",
        "settings": dict(settings),
        "estimate": asdict(row),
        **more,
    }
    (directory / JSON_FILE).write_text(json.dumps(content, indent=2) + "\n")
