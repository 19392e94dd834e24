"""The peak of a step at any batch size, in a time that depends neither on it nor on the depth."""

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

from qst_tune.estimation.depth import Shorten, of_more_parts, timeline_of_fewer_layers
from qst_tune.estimation.fake_device import BATCH_LOOPS, first_and_last_parts
from qst_tune.estimation.tracker import Timeline

# Steps of a batch size, of a whole model or of one that is changed first.
Trace = Callable[[int, Shorten | None], Timeline]
# Full parts of a batch: of the smaller step that is extended, and of the one that it is checked by.
_FEW, _CHECKED = 3, 5


class BatchPeaks:
    """Peaks by batch size: of fewer layers, if these give the peaks of a whole step that is known.

    A batch that runs through the whole model in parts of ``part_rows`` rows has the peaks of three
    and four full parts, if these give the peaks of five. The ``known`` step has ``batch_size``
    rows. The model is on meta; only its structure is read.
    """

    def __init__(
        self, model: Any, trace: Trace, batch_size: int, known: Timeline, part_rows: int
    ) -> None:
        self._model = model
        self._trace = trace
        self._part_rows = part_rows
        self._known = {batch_size: max(known.peaks())}
        shallow = self._shallow(batch_size)
        self._missing = _missing_bytes(shallow, known) if shallow else None

    @property
    def is_shallow(self) -> bool:
        """Whether fewer layers are enough."""
        return self._missing is not None

    def __call__(self, batch_size: int) -> int:
        """Return the peak of a batch size, in bytes."""
        if batch_size not in self._known:
            self._known[batch_size] = self._peak(batch_size)
        return self._known[batch_size]

    def _peak(self, batch_size: int) -> int:
        parts, rest = divmod(batch_size, self._part_rows)
        if parts > _CHECKED and self._parts_repeat:
            found = self._from_parts(parts, rest)
            if found is not None:
                return max(found)
        return max(self._peaks(batch_size))

    @cached_property
    def _parts_repeat(self) -> bool:
        return self._from_parts(_CHECKED, 0) == self._peaks(_CHECKED * self._part_rows)

    def _from_parts(self, parts: int, rest: int) -> list[int] | None:
        found = self._few_parts(rest)
        timeline = of_more_parts(*found, parts - _FEW) if found else None
        return None if timeline is None else self._with_missing(timeline)

    @cache  # noqa: B019  # lives as long as one question
    def _few_parts(self, rest: int) -> tuple[Timeline, Timeline]:
        sizes = [n * self._part_rows + rest for n in (_FEW, _FEW + 1)]
        was_shallow = self.is_shallow
        few, many = map(self._step, sizes)
        if was_shallow != self.is_shallow:  # few layers were not enough: both of all, then
            few, many = map(self._step, sizes)
        return few, many

    def _peaks(self, batch_size: int) -> list[int]:
        return self._with_missing(self._step(batch_size))

    def _with_missing(self, timeline: Timeline) -> list[int]:
        peaks = timeline.peaks()
        missing = self._missing or [0] * len(peaks)
        return [peak + more for peak, more in zip(peaks, missing, strict=True)]

    def _step(self, batch_size: int) -> Timeline:
        """A step of few layers where they are enough."""
        shallow = self._shallow(batch_size) if self._missing else None
        if shallow is not None:
            return shallow
        self._missing = None
        with first_and_last_parts(*BATCH_LOOPS):
            return self._trace(batch_size, None)

    def _shallow(self, batch_size: int) -> Timeline | None:
        with first_and_last_parts(*BATCH_LOOPS):
            return timeline_of_fewer_layers(
                self._model, lambda shorten: self._trace(batch_size, shorten)
            )


def _missing_bytes(shallow: Timeline, whole: Timeline) -> list[int] | None:
    """What each phase of the shallow step lacks, at any batch size; None if it is another step.

    That is the frozen weights that were left out. The optimizer's phase does not depend on the
    batch, so it lacks the same at all batch sizes. It may lack more, such as the norms of all
    gradients in one tensor, which is rounded up.
    """
    frozen = whole.start_bytes - shallow.start_bytes
    names = [phase for phase, _ in whole.phases]
    if names != [phase for phase, _ in shallow.phases]:
        return None
    missing = [a - b for a, b in zip(whole.peaks(), shallow.peaks(), strict=True)]
    is_same = all(
        m == frozen for m, name in zip(missing, names, strict=True) if name != "optimizer"
    )
    return missing if is_same else None
