"""A step that runs one layer of each kind, and what it would be with all layers.

A layer without a side block allocates, releases and computes what any other of its kind does: one
that is made of the same, trains as it does, and follows such a one. So only the first of each kind
runs, and the others are put into its record where they would have run.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from qst_tune.estimation.tracker import Segment, Timeline
from qst_tune.modules.qst_model import QSTModel

_SIMPLE = (bool, int, float, str, type(None))
# Attributes that number a layer, without changing what it does.
_NUMBERS = ("layer_idx", "layer_id", "layer_number", "training")


def kinds_of_layers(model: Any) -> list[str]:
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
            [
                (k, v)
                for k, v in vars(module).items()
                if isinstance(v, _SIMPLE) and k not in _NUMBERS
            ],
            [(k, tuple(p.shape), type(p).__name__) for k, p in module.named_parameters("", False)],
        )
        for name, module in layer.named_modules()
    ]


def stand_ins(model: QSTModel) -> dict[int, int]:
    """The layers that need not run, each with the one that runs in its place.

    The last layer always runs, and so do the first two, since the state before them is saved. So
    does one that trains behind a side block, whose backward pass is done when that layer's is.
    """
    kinds, lora = kinds_of_layers(model), model.side.lora
    first = len(kinds) if lora is None else lora.first

    def role(index: int) -> tuple[object, ...]:
        return kinds[index], index >= first, index == first, index in model.side.layers

    of_kind: dict[object, int] = {}
    skipped = {}
    for index in range(1, len(kinds) - 1):
        if index in model.side.layers or (index >= first and index - 1 in model.side.layers):
            continue
        key = (role(index - 1), role(index))
        if of_kind.setdefault(key, index) != index:
            skipped[index] = of_kind[key]
    return skipped


def skip(model: Any, layers: Sequence[int]) -> None:
    """Let layers compute nothing, in place: the model's own loop still runs over all of them."""
    # Of those that ran; None: no tuple, as of a layer that runs without a call.
    num_others: list[int | None] = [None]  # values behind the state

    def look(_: nn.Module, __: object, output: object) -> None:
        num_others.append(len(output) - 1 if isinstance(output, tuple) else None)

    def nothing(*args: object, **kwargs: object) -> Any:
        state, count = args[0] if args else kwargs["hidden_states"], num_others[-1]
        return state if count is None else (state, *[None] * count)

    for index, layer in enumerate(model.layers):
        if index not in layers:
            layer.register_forward_hook(look)
            continue
        layer = model.layers[index] = getattr(layer, "_checkpoint_wrapped_module", layer)
        layer.forward = nothing
        layer.is_skipped = True


def runs(layer: nn.Module) -> bool:
    """Whether a layer is not one of :func:`skip`."""
    return not getattr(layer, "is_skipped", False)


def with_skipped(step: Timeline, skipped: Mapping[int, int]) -> Timeline:
    """The step with all layers, from that of a model whose ``skipped`` ones did not run."""
    segments = [
        segment for one_pass in _passes(step.segments) for segment in _filled(one_pass, skipped)
    ]
    return Timeline.of_segments(step.start_bytes, segments)


def _passes(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Split where a phase begins, or where layers begin anew: at the first, or in backward last."""
    one_pass: list[Segment] = []
    for segment in segments:
        if one_pass and not _goes_on(one_pass, segment):
            yield one_pass
            one_pass = []
        one_pass.append(segment)
    if one_pass:
        yield one_pass


def _goes_on(one_pass: Sequence[Segment], segment: Segment) -> bool:
    last = one_pass[-1]
    if segment.phase != last.phase or segment.layer is None:
        return False
    return last.layer is None or (
        segment.layer < last.layer if last.phase == "backward" else segment.layer > last.layer
    )


def _filled(one_pass: Sequence[Segment], skipped: Mapping[int, int]) -> Iterator[Segment]:
    """A pass with the skipped layers between those that ran."""
    of_layer = {segment.layer: segment for segment in one_pass}
    for segment, following in pairwise([*one_pass, None]):
        assert segment is not None
        yield segment
        if following is None or segment.layer is None or following.layer is None:
            continue
        step = 1 if following.layer > segment.layer else -1
        for between in range(segment.layer + step, following.layer, step):
            if skipped.get(between) in of_layer:
                yield of_layer[skipped[between]]
