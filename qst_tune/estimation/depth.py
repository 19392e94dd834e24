"""The memory of a step of a deep model from steps that run some of its layers.

A step allocates and releases the same bytes for every layer of a kind, except the first and the
last ones. So of frozen layers in a row, which save nothing, one of each kind is as good as all.
Where layers do save something, the step of one period of layers more differs in one block of
changes for each phase, and the step of the whole model is that of a short one with this block
repeated.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, TypeAlias

from torch import nn

from qst_tune.estimation.tracker import Timeline
from qst_tune.modules.qst_model import QSTModel

Shorten: TypeAlias = Callable[[Any], None]
_SIMPLE = (bool, int, float, str, type(None))
# Attributes that number a layer, without changing what it does.
_NUMBERS = ("layer_idx", "layer_id", "layer_number", "training")
_LONGEST_PERIOD = 12


def timeline_of_fewer_layers(model: Any, trace: Callable[[Shorten], Timeline]) -> Timeline | None:
    """Compute the step of a model, on meta, from steps with a part of its layers.

    ``trace`` runs the step of the model after a change in place. The result is as of all layers,
    except that ``start_bytes`` lacks the frozen weights of those left out. It is None if the model
    cannot be shortened so.
    """
    kinds = _kinds(model)
    if isinstance(model, QSTModel) and model.side.layers != list(range(len(kinds))):
        return trace(partial(_skip, layers=_repeated_frozen_layers(kinds, model.side.layers)))
    found = _period(kinds)
    if found is None:
        return None
    depth, period = found
    short, longer = (trace(partial(_keep, depth=n)) for n in (depth, depth + period))
    return _extend(short, longer, (len(kinds) - depth) // period, _add_layers)


def _kinds(model: Any) -> list[str]:
    """What each layer is made of, and what the configuration sets for it alone."""
    layers = model.layers
    config = getattr(getattr(model, "backbone", None), "config", None)
    lists = [
        value
        for _, value in sorted(getattr(config, "__dict__", {}).items())
        if isinstance(value, list) and len(value) == len(layers)
    ]
    return [
        repr(([value[index] for value in lists], _structure(layer)))
        for index, layer in enumerate(layers)
    ]


def _structure(layer: nn.Module) -> list[Any]:
    return [
        (
            name,
            type(module).__name__,
            [(k, v) for k, v in vars(module).items() if isinstance(v, _SIMPLE) and not _numbers(k)],
            [(k, tuple(p.shape), type(p).__name__) for k, p in module.named_parameters("", False)],
        )
        for name, module in layer.named_modules()
    ]


def _numbers(attribute: str) -> bool:
    return attribute in _NUMBERS


def _repeated_frozen_layers(kinds: Sequence[str], with_block: Sequence[int]) -> list[int]:
    """Layers without a side block that follow one of their kind, with no side block between."""
    repeated, seen = [], set[str]()
    for index, kind in enumerate(kinds):
        if index in with_block:
            seen.clear()
        elif kind in seen and index >= 2:  # the state before the first layer is saved
            repeated.append(index)
        else:
            seen.add(kind)
    return repeated


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


def _skip(model: Any, layers: Sequence[int]) -> None:
    """Make layers empty, in place: the model's own loop still runs over all of them."""
    is_tuple: list[bool] = []
    for index, layer in enumerate(model.layers):
        if index not in layers:
            layer.register_forward_hook(lambda *seen: is_tuple.append(isinstance(seen[2], tuple)))
            continue
        layer = model.layers[index] = getattr(layer, "_checkpoint_wrapped_module", layer)
        for held in (layer._modules, layer._parameters, layer._buffers):
            held.clear()

        def nothing(*args: Any, **kwargs: Any) -> Any:
            state = args[0] if args else kwargs["hidden_states"]
            return (state, None, None) if is_tuple[-1] else state

        layer.forward = nothing


def _keep(model: Any, *, depth: int) -> None:
    """Let only the first layers run, in place, and the side blocks that belong to them."""
    fewer = len(model.layers) - depth
    _skip(model, range(depth, len(model.layers)))
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
