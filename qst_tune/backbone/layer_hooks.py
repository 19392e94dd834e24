"""What is done at the layers of a running transformers model, whose own code makes everything else.

States are shown as soon as they are there; a pass can be left where a layer begins, and another one
begin there, whose first layers pass on what they are given; and the last layers can have LoRA.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp import FSDPModule

from qst_tune.modules.lora import LayerLoRA


@contextmanager
def showing(
    layers: nn.ModuleList, taps: Sequence[int], show: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    """Show the states of ``taps``: 0 is what the first layer reads, l the output of the l-th."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        show(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        show(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for tap in taps:
            if tap == 0:
                handle = layers[0].register_forward_pre_hook(before, with_kwargs=True)
            else:
                handle = layers[tap - 1].register_forward_hook(after)
            stack.callback(handle.remove)
        yield


class Reached(Exception):  # noqa: N818  # not an error: how a pass is left early
    """The pass has come to a layer, which would read ``state``."""

    def __init__(self, state: torch.Tensor) -> None:
        super().__init__()
        self.state = state


def run_until(layer: nn.Module, run: Callable[[], object]) -> torch.Tensor:
    """Run a model until it calls a layer; return the state that the layer would read."""

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Reached(args[0] if args else kwargs["hidden_states"])

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except Reached as reached:
        return reached.state
    finally:
        handle.remove()
    raise AssertionError("the layer did not run")


@contextmanager
def starting_at(
    backbone: Any, since: int, state: torch.Tensor, *, num_others: int | None
) -> Iterator[None]:
    """Let a pass over transformers compute nothing before layer ``since``, which reads ``state``.

    ``num_others``: how many values a layer returns behind its state; None: no tuple.
    """
    layers = backbone.layers

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return given if num_others is None else (given, *[None] * num_others)

    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    with ExitStack() as stack:
        if isinstance(backbone.embedding, FSDPModule):
            stack.enter_context(_zeros_embedded(backbone.decoder, backbone.embedding, state.dtype))
        for index, layer in enumerate(itertools.islice(layers, since)):
            layers[index] = _InPlaceOf(layer, pass_on)
            stack.callback(layers.__setitem__, index, layer)
        handle = layers[since].register_forward_pre_hook(replace, with_kwargs=True)
        stack.callback(handle.remove)
        yield


class _InPlaceOf(nn.Module):
    """Is called in the place of a module, which FSDP would gather at a call.

    What a model reads of its modules, such as a layer's kind of attention, is the module's.
    """

    def __init__(self, module: nn.Module, compute: Callable[..., Any]) -> None:
        super().__init__()
        self._what = (module, compute)  # in a tuple: the module is no submodule

    def __getattr__(self, name: str) -> Any:
        if name == "_what":  # not there yet
            raise AttributeError(name)
        return getattr(self._what[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._what[1](*args, **kwargs)


@contextmanager
def _zeros_embedded(decoder: nn.Module, embedding: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let a pass read zeros for the embeddings of its tokens."""

    def zeros(tokens: torch.Tensor) -> torch.Tensor:
        size = (*tokens.shape, embedding.embedding_dim)
        return torch.zeros(size, dtype=dtype, device=tokens.device)

    paths = [path for path, module in decoder.named_modules() if module is embedding]
    for path in paths:
        decoder.set_submodule(path, _InPlaceOf(embedding, zeros))
    try:
        yield
    finally:
        for path in paths:
            decoder.set_submodule(path, embedding)


@contextmanager
def gradient_from(layers: nn.ModuleList, lora: LayerLoRA | None) -> Iterator[None]:
    """Let the layers with LoRA, and what follows them, compute in the gradient mode of now."""
    if lora is None:
        yield
        return
    gradient = torch.is_grad_enabled()

    def begin(*_: object) -> None:
        torch.set_grad_enabled(gradient)  # until the no_grad around this pass ends

    handle = layers[lora.first].register_forward_pre_hook(begin)
    try:
        with lora.trained(layers):
            yield
    finally:
        handle.remove()


@torch.no_grad()
def other_values(layers: nn.ModuleList, run: Callable[[], object]) -> int | None:
    """Count what the layers of a model return behind their state; None: no tuple. Runs it."""
    seen: list[int | None] = []

    def look(_: nn.Module, __: object, output: object) -> None:
        seen.append(len(output) - 1 if isinstance(output, tuple) else None)

    handle = layers[0].register_forward_hook(look)
    try:
        run()
    finally:
        handle.remove()
    return seen[0]


def is_same(whole: torch.Tensor, split: torch.Tensor) -> bool:
    """Whether a split pass has computed what a whole one does; assumed of tensors without values.

    It has not where layers hand on more than one state: Gemma 3n's, or keys that they share.
    """
    if isinstance(whole, FakeTensor) or whole.is_meta:
        return True
    return bool((whole - split).abs().max() <= 1e-3 * whole.abs().max())


@contextmanager
def before_projection(decoder: Any, kept: list[torch.Tensor]) -> Iterator[None]:
    """Keep what OPT-350M brings to the width of its embedding: here the head does that."""
    project_out = getattr(decoder, "project_out", None)
    if project_out is None:
        yield
        return
    handle = project_out.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    try:
        yield
    finally:
        handle.remove()
