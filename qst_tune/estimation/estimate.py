"""The estimate of one method: memory of a step, and the largest batch that fits; for people."""

import gc
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from qst_tune.config.schema import StepConfig, TrainingConfig
from qst_tune.data.batches.schedule import schedule_of
from qst_tune.data.batches.training_data import TrainingData
from qst_tune.distributed.processes import rank_and_world_size
from qst_tune.errors import UserError
from qst_tune.estimation.batch_peaks import BatchPeaks, Shorten
from qst_tune.estimation.fake_device import Attention, DeviceType
from qst_tune.estimation.spread import Spread, spread_line
from qst_tune.estimation.step import ALL_ROWS, Setup, Shape, StepCost, own_setup, trace_step
from qst_tune.estimation.tracker import PARTS, Timeline
from qst_tune.modules.memory import GIB
from qst_tune.training.preference import PreferenceTask

JSON_FILE = "estimate.json"
# Taken where tokenizer.max_seq_len is null, since rows are then as long as the data.
DEFAULT_SEQ_LEN = 512
ONE_PROCESS = Spread(1, None)
_COLUMNS = ["peak", "frozen", "trained", "optimizer", "gradients", "saved", "loss", "transient"]


@dataclass(frozen=True)
class Row:
    """One method: its title, a step's cost, and the rows that fit into the memory asked about."""

    title: str
    cost: StepCost
    largest_batch: int | None = None


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
            batch = None if self.fit_gib is None else self._largest_batch(setup, timeline)
        line = None
        if self.spread.num_processes > 1:
            pairs = isinstance(setup.task, PreferenceTask)
            peak = cost.memory.num_bytes
            line = spread_line(self.spread, setup.model, peak, has_reference=pairs)
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
        def of_a_process(num_bytes: int) -> int:
            return self.spread.peak_bytes(setup.model, num_bytes)

        fixed, limit = of_a_process(timeline.start_bytes), (self.fit_gib or 0) * GIB
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

    def crossing(first: int, second: int) -> int:
        """Largest batch size at which the line through two known ones is within the limit."""
        slope = (peak(second) - peak(first)) / (second - first)
        if slope <= 0:  # something else than the rows is the peak
            return 2 * second
        return first + int((limit_bytes - peak(first)) / slope)

    def between(low: int, high: int) -> int:
        """The answer, between a batch size that fits and one that does not, both known."""
        width = 2 * (high - low)
        while high - low > 1:
            guess = min(max(crossing(low, high), low + 1), high - 1)
            if high - low > width / 2:  # where memory bends, lines lead on slowly
                guess = (low + high) // 2
            width = high - low
            low, high = (guess, high) if peak(guess) <= limit_bytes else (low, guess)
        return low

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


def write(directory: Path, row: Row, settings: Mapping[str, object]) -> None:
    """Write ``estimate.json``: the row, and what it is for."""
    content = {
        "unit": "bytes; GiB = 2^30 bytes",
        "settings": dict(settings),
        "estimate": asdict(row),
    }
    (directory / JSON_FILE).write_text(json.dumps(content, indent=2) + "\n")


def describe_run(
    cfg: TrainingConfig, data: TrainingData, device: torch.device, dtype: torch.dtype
) -> str:
    """Describe a run that would begin now, for ``dry_run``: its steps, rows and peak memory.

    UserError if memory on the device cannot be estimated.
    """
    schedule = schedule_of(cfg, data.train)
    num_validation = len(data.validation.dataset) if data.validation else 0
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"dry_run: memory on device={device} cannot be estimated: use cpu or cuda")
    shape = Shape(cfg.batch_size, cfg.tokenizer.get("max_seq_len") or DEFAULT_SEQ_LEN)
    question = Question(
        lambda: own_setup(cfg, dtype),
        cfg,
        shape,
        device="cuda" if device.type == "cuda" else "cpu",
        spread=Spread.of_config(cfg, rank_and_world_size()[1]),
    )
    row, spread = question.answer()
    lines = [
        f"dry run: {schedule.num_steps} steps in {schedule.epochs} epochs of "
        f"{len(data.train.dataset)} rows, {num_validation} rows for validation; nothing was "
        "written",
        f"peak memory of a step of {shape.batch_size} x {shape.seq_len} tokens and its parts, "
        "GiB (2^30 bytes)",
        table([row]),
    ]
    return "\n".join([*lines, spread] if spread else lines)
