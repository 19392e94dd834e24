"""The peak of a step at any batch size, in a time that depends neither on it nor on the depth."""

from collections.abc import Callable
from typing import Any

from qst_tune.estimation.depth import Shorten, timeline_of_fewer_layers
from qst_tune.estimation.fake_device import BATCH_LOOPS, first_and_last_parts
from qst_tune.estimation.tracker import Timeline

# Steps of a batch size, of a whole model or of one that is changed first.
Trace = Callable[[int, Shorten | None], Timeline]


class BatchPeaks:
    """Peaks by batch size: of fewer layers, if these give the peaks of a whole step that is known.

    Args:
        model (Any): of a method, on meta; only its structure is read.
        trace (Trace): of this model.
        batch_size (int): of the known step.
        known (Timeline): all layers, all parts of the batch.
    """

    def __init__(self, model: Any, trace: Trace, batch_size: int, known: Timeline) -> None:
        self._model = model
        self._trace = trace
        self._known = {batch_size: max(known.peaks())}
        shallow = self._shallow(batch_size)
        self._missing = _missing_bytes(shallow, known) if shallow else None

    @property
    def is_shallow(self) -> bool:
        """Whether fewer layers are enough."""
        return self._missing is not None

    def __call__(self, batch_size: int) -> int:
        """Give the peak.

        Args:
            batch_size (int): number of rows.

        Returns:
            int: bytes.
        """
        if batch_size not in self._known:
            self._known[batch_size] = self._peak(batch_size)
        return self._known[batch_size]

    def _peak(self, batch_size: int) -> int:
        shallow = self._shallow(batch_size) if self._missing else None
        if shallow is None or self._missing is None:
            with first_and_last_parts(*BATCH_LOOPS):
                return max(self._trace(batch_size, None).peaks())
        return max(map(sum, zip(shallow.peaks(), self._missing, strict=True)))

    def _shallow(self, batch_size: int) -> Timeline | None:
        with first_and_last_parts(*BATCH_LOOPS):
            return timeline_of_fewer_layers(
                self._model, lambda shorten: self._trace(batch_size, shorten)
            )


def _missing_bytes(shallow: Timeline, whole: Timeline) -> list[int] | None:
    """What each phase of the shallow step lacks, at any batch size; None if it is another step.

    That is the frozen weights that were left out. The optimizer's phase knows no batch, so whatever
    it lacks at one batch size it lacks at all: there it may be more, such as the norms of all
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
