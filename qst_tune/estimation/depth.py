"""The memory of a step of a deep model from the steps of two shallow ones.

A step allocates and releases the same bytes for every layer but the first and the last. So the
step of one layer more differs from another's in one block of changes for each phase, and the step
of L layers is that of n with this block repeated L - n times.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, TypeAlias

from torch import nn
from torchtune.modules import TransformerDecoder

from qst_tune.estimation.tracker import Timeline
from qst_tune.modules.qst_decoder import QSTDecoder

# The first and the last layer may differ from those between.
SHALLOW = (2, 3)

Shorten: TypeAlias = Callable[[TransformerDecoder], None]


def timeline_of_fewer_layers(
    model: TransformerDecoder, trace: Callable[[Shorten], Timeline]
) -> Timeline | None:
    """Give the step of a model by running a part of its layers.

    Args:
        model (TransformerDecoder): of any method, on meta; only its structure is read.
        trace (Callable[[Shorten], Timeline]): step of the model after a change in place.

    Returns:
        Timeline | None: as of all layers, except that ``start_bytes`` lacks the frozen weights of
        those left out; None if the model cannot be shortened so.
    """
    num_layers = len(model.layers)
    if isinstance(model, QSTDecoder) and model.side.layers != list(range(num_layers)):
        return trace(_drop_repeated_frozen_layers)
    if num_layers <= sum(SHALLOW):
        return None
    short, longer = (trace(partial(_keep_first_layers, depth=depth)) for depth in SHALLOW)
    return _deepen(short, longer, num_layers - SHALLOW[0])


def _drop_repeated_frozen_layers(model: TransformerDecoder) -> None:
    """Of the layers between two side blocks, which keep nothing, one is as good as many."""
    side: Any = model.side
    beside = set(side.layers)
    # The layer before is one without a side block, too.
    repeated = {i for i in range(2, len(model.layers)) if not {i, i - 1} & beside}
    kept = [i for i in range(len(model.layers)) if i not in repeated]
    model.layers = nn.ModuleList(model.layers[i] for i in kept)
    side.layers = [kept.index(i) for i in side.layers]


def _keep_first_layers(model: TransformerDecoder, *, depth: int) -> None:
    """Cut a model, in place, to its first layers and the side blocks that belong to them."""
    fewer = len(model.layers) - depth
    model.layers = model.layers[:depth]
    if isinstance(model, QSTDecoder):
        side = model.side
        side.layers = side.layers[:depth]
        side.gates, side.blocks = side.gates[:depth], side.blocks[:depth]
        side.downsample = side.downsample[: len(side.downsample) - fewer]


def _deepen(short: Timeline, longer: Timeline, more: int) -> Timeline | None:
    """A step of ``more`` layers than ``short`` has, ``longer`` having one more."""
    if [phase for phase, _ in short.phases] != [phase for phase, _ in longer.phases]:
        return None
    phases = []
    for (phase, few), (_, many) in zip(short.phases, longer.phases, strict=True):
        changes = _repeat(_runs(few), _runs(many), more)
        if changes is None:
            return None
        phases.append((phase, changes))
    return Timeline(_affine(short.start_bytes, longer.start_bytes, more), phases)


def _repeat(few: list[int], many: list[int], more: int) -> list[int] | None:
    period = len(many) - len(few)
    if period == 0:  # one operation for the tensors of all layers
        return [_affine(a, b, more) for a, b in zip(few, many, strict=True)]
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
