"""The memory of a step of a deep model from steps that run some of its layers.

A step allocates and releases the same bytes for every layer of a kind, except the first and the
last ones. So of frozen layers in a row, which save nothing, one of each kind is as good as all.
Where layers do save something, the step of one period of layers more differs in one block of
changes for each phase, and the step of the whole model is that of a short one with this block
repeated.
"""

from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from itertools import groupby
from typing import Any, TypeAlias

from torch import nn

from qst_tune.estimation.fake_device import BATCH_LOOPS, first_and_last_parts
from qst_tune.estimation.skipped_layers import kinds_of_layers, skip, stand_ins, with_skipped
from qst_tune.estimation.tracker import Phase, Timeline
from qst_tune.modules.qst_model import QSTModel

Shorten: TypeAlias = Callable[[Any], None]
_LONGEST_PERIOD = 12


def timeline_of_fewer_layers(model: Any, trace: Callable[[Shorten], Timeline]) -> Timeline | None:
    """Compute the step of a model, on meta, from steps with a part of its layers.

    ``trace`` runs the step of the model after a change in place. The result is as of all layers,
    except that ``start_bytes`` lacks the frozen weights of those left out. It is None if the model
    cannot be shortened so.
    """
    if isinstance(model, QSTModel) and (skipped := stand_ins(model)):
        return with_skipped(trace(partial(skip, layers=list(skipped))), skipped)
    found = None if _is_uneven(model) else _period(kinds_of_layers(model))
    if found is None:
        return None
    depth, period = found
    short, longer = (trace(partial(_keep, depth=n)) for n in (depth, depth + period))
    return _extend(short, longer, (len(model.layers) - depth) // period, _add_layers)


def _is_uneven(model: Any) -> bool:
    """Whether some layers have a side block, or LoRA, and others have not."""
    if not isinstance(model, QSTModel):
        return False
    return model.side.lora is not None or len(model.side.layers) < len(model.layers)


def _period(kinds: Sequence[str]) -> tuple[int, int] | None:
    """The smallest depth, and period by which it grows, that look like the whole model."""
    total = len(kinds)
    choices = [
        (depth, period)
        for period in range(1, min(_LONGEST_PERIOD, total) + 1)
        for depth in range(max(2, period), total)
        if (total - depth) % period == 0
        and 2 * depth + period < total
        and all(kinds[i] == kinds[i + period] for i in range(depth - period, total - period))
    ]
    return min(choices, key=lambda choice: 2 * choice[0] + choice[1], default=None)


def _keep(model: Any, *, depth: int) -> None:
    """Let only the first layers run, in place, and the side blocks that belong to them."""
    fewer = len(model.layers) - depth
    skip(model, range(depth, len(model.layers)))
    for layer in model.layers[depth:]:
        for held in (layer._modules, layer._parameters, layer._buffers):
            held.clear()
    if isinstance(model, QSTModel):
        side = model.side
        side.layers = side.layers[:depth]
        side.gates, side.blocks = side.gates[:depth], side.blocks[:depth]
        side.downsample = side.downsample[: len(side.downsample) - fewer]


def of_more_parts(few: Timeline, many: Timeline, more: int) -> Timeline | None:
    """Compute the step of a batch whose rows run through the whole model in parts, in sequence.

    ``few`` is the step of some full parts and a rest, ``many`` that of one full part more, and the
    batch has ``more`` full parts more than ``few``. None if the parts do not repeat.
    """
    return _extend(few, many, more, _add_parts)


def _add_parts(few: list[int], many: list[int], more: int) -> list[int] | None:
    """What repeats stays as it is; what is of the whole batch grows with it."""
    period = len(many) - len(few)
    starts = range(len(many) - 2 * period + 1) if period > 0 else range(0)
    same = (i for i in starts if many[i : i + period] == many[i + period : i + 2 * period])
    first = next(same, None)
    if first is None:
        return None
    rest = map(_affine, few, many[:first] + many[first + period :], [more] * len(few))
    changes = list(rest)
    return changes[:first] + many[first : first + period] * more + changes[first:]


def _extend(
    few: Timeline,
    many: Timeline,
    more: int,
    insert: Callable[[list[int], list[int], int], list[int] | None],
) -> Timeline | None:
    """The step of ``few`` with what ``many`` has in addition, ``more`` times, phase by phase."""
    if [phase for phase, _ in few.phases] != [phase for phase, _ in many.phases]:
        return None
    phases = []
    for (phase, a), (_, b) in zip(few.phases, many.phases, strict=True):
        short, longer = _runs(a), _runs(b)
        if len(short) == len(longer):  # one operation for the tensors of all layers or rows
            changes = [_affine(x, y, more) for x, y in zip(short, longer, strict=True)]
        elif (found := insert(short, longer, more)) is None:
            return None
        else:
            changes = found
        phases.append((phase, changes))
    return Timeline(_affine(few.start_bytes, many.start_bytes, more), phases)


def _add_layers(few: list[int], many: list[int], more: int) -> list[int] | None:
    period = len(many) - len(few)
    same = next((i for i, (a, b) in enumerate(zip(few, many, strict=False)) if a != b), len(few))
    if period < 0 or few[same:] != many[same + period :]:
        return None
    return few[:same] + many[same : same + period] * more + few[same:]


def _affine(at_short: int, at_longer: int, more: int) -> int:
    return at_short + more * (at_longer - at_short)


def _runs(changes: Sequence[int]) -> list[int]:
    """Changes of one sign in a row as one, since only turning points can be a peak."""
    nonzero = (change for change in changes if change)
    return [sum(run) for _, run in groupby(nonzero, key=lambda change: change > 0)]


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
        self, model: nn.Module, trace: Trace, batch_size: int, known: Timeline, part_rows: int
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

    @cache  # noqa: B019  # lives as long as one request
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
        missing = self._missing or {}
        return [
            peak + missing.get(phase, 0)
            for peak, (phase, _) in zip(timeline.peaks(), timeline.phases, strict=True)
        ]

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


def _missing_bytes(shallow: Timeline, whole: Timeline) -> dict[Phase, int] | None:
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
    return dict(zip(names, missing, strict=True)) if is_same else None
