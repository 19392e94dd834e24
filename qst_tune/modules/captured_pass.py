"""A forward and a backward pass of one shape, recorded, and replayed as one node of autograd."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.func import functional_call

Tensors = Sequence[torch.Tensor]
Inputs = dict[str, torch.Tensor]
Compute = Callable[..., tuple[torch.Tensor, ...]]
# A recorded pass may be this many times as far from a plain one as another plain one is: the
# farthest of so many. Another dropout mask, or a stale input, is thousands of times as far.
_TOLERATED_RATIO = 4
_COMPARED_PASSES = 3


class Recorder(Protocol):
    """What records work; see :class:`~qst_tune.modules.cuda_graph.CudaGraphs`."""

    def rehearse(self, work: Callable[[], object]) -> None:
        """Do work once; RuntimeError if it cannot be recorded."""

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        """Record work; what is returned does it."""

    def same_random_numbers(self) -> AbstractContextManager[None]:
        """Let what follows draw the numbers that it would draw without the work in here."""


class SharedTensors:
    """Where all captured passes leave their results, one pass after the other.

    ``gradients`` are the parameters'. So memory does not grow with the number of shapes, of which
    none has more than ``most_tokens``.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.gradients = [torch.zeros_like(parameter) for parameter in parameters]
        self._flat: dict[tuple[object, ...], torch.Tensor] = {}

    def like(self, what: str, tensors: Tensors, num_tokens: int) -> list[torch.Tensor]:
        """Return tensors of these shapes and dtypes for what ``what`` names."""
        shared = []
        for number, tensor in enumerate(tensors):
            most = -(-tensor.numel() // num_tokens) * self.most_tokens
            key = (what, number, most, tensor.dtype)
            if key not in self._flat:
                self._flat[key] = tensor.new_zeros(most)
            shared.append(self._flat[key][: tensor.numel()].view(tensor.shape))
        return shared


class NetworksPass(nn.Module):
    """What a pass computes, as a module of the networks that train in it."""

    def __init__(self, networks: Sequence[nn.Module], compute: Compute) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.compute = compute

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute."""
        return self.compute(**inputs)


class CapturedPass:
    """``compute(**inputs)`` and its gradients for what trains of ``networks``, recorded.

    It fits inputs like these; ``tokens`` ``[B, T]`` are among them. Some output depends on the
    networks' parameters. A backward pass belongs to the last forward pass of all that share
    ``shared``. In no-grad mode there is none. ValueError if what was recorded gives other values
    than the plain pass before it; where kernels add in any order, so that plain passes differ, if
    it differs by more than these do.
    """

    def __init__(
        self,
        compute: Compute,
        inputs: Inputs,
        networks: Sequence[nn.Module],
        shared: SharedTensors,
        recorder: Recorder,
    ) -> None:
        self._pass, self.shared = NetworksPass(networks, compute), shared
        named = {name: p for name, p in self._pass.named_parameters() if p.requires_grad}
        self._names, self.parameters = list(named), list(named.values())
        self._leaves: list[nn.Parameter] = []
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self._addresses = _addresses(self.parameters)
        self._goes_back = torch.is_grad_enabled()
        self._outputs: tuple[torch.Tensor, ...] = ()
        self.is_used = [False] * len(self.parameters)
        with recorder.same_random_numbers():
            recorder.rehearse(self._rehearse)
        expected = self._results()
        with recorder.same_random_numbers():
            self._replay_forward = recorder.record(self._forward)
            if self._goes_back:
                self._replay_backward = recorder.record(self._backward)
        self._outputs = ()  # what backward needs belongs to the graphs alone from now on
        with recorder.same_random_numbers():
            self._replay_forward()
            if self._goes_back:
                self._replay_backward()
        error = _distance(self._results(), expected)
        if error == 0:
            return
        distances = [self._plain_distance(expected, recorder) for _ in range(_COMPARED_PASSES)]
        if math.isinf(error) or error > _TOLERATED_RATIO * max(distances):
            raise ValueError("a recorded pass gives other values than a plain one")

    def _plain_distance(self, expected: Tensors, recorder: Recorder) -> float:
        """How far another plain pass of the same inputs is from the first."""
        with recorder.same_random_numbers():
            recorder.rehearse(self._rehearse)
        self._outputs = ()
        return _distance(self._results(), expected)

    def _results(self) -> list[torch.Tensor]:
        return [result.clone() for result in (*self.outputs, *self._gradients)]

    def _computed(self) -> tuple[torch.Tensor, ...]:
        """Compute with new leaves of autograd over the memory of the parameters.

        A parameter's own node, while an earlier loss keeps it alive, belongs to the stream of that
        loss, and a recording whose backward pass goes there is void.
        """
        self._leaves = [nn.Parameter(parameter.detach()) for parameter in self.parameters]
        leaves: dict[str, torch.Tensor] = dict(zip(self._names, self._leaves, strict=True))
        outputs: tuple[torch.Tensor, ...] = functional_call(self._pass, leaves, (), self.inputs)
        return outputs

    def _rehearse(self) -> None:
        self._outputs = self._computed()
        self.is_differentiable = [output.requires_grad for output in self._outputs]
        num_tokens = self.inputs["tokens"].numel()
        self.outputs = self.shared.like("outputs", self._outputs, num_tokens)
        wanted = [output for output in self._outputs if output.requires_grad]
        self.output_gradients = self.shared.like("gradients", wanted, num_tokens)
        _copy([output.detach() for output in self._outputs], self.outputs)
        _copy([output.detach() for output in wanted], self.output_gradients)  # any will do
        if self._goes_back:
            self._backward()

    def _forward(self) -> None:
        self._outputs = self._computed()
        _copy([output.detach() for output in self._outputs], self.outputs)

    def _backward(self) -> None:
        wanted = [output for output in self._outputs if output.requires_grad]
        # A caller's autocast is for forward passes.
        with torch.autocast(self.inputs["tokens"].device.type, enabled=False):
            found = torch.autograd.grad(
                wanted, self._leaves, self.output_gradients, allow_unused=True
            )
        self.is_used = [gradient is not None for gradient in found]
        _copy([gradient for gradient in found if gradient is not None], self._gradients)

    @property
    def _gradients(self) -> list[torch.Tensor]:
        """Those of the parameters that the outputs depend on."""
        pairs = zip(self.shared.gradients, self.is_used, strict=True)
        return [gradient for gradient, is_used in pairs if is_used]

    def fits(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these parameters are where those were that were recorded."""
        return self._addresses == _addresses(parameters)

    def forward(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """Compute the outputs; nothing overwrites them."""
        _copy([inputs[name] for name in self.inputs], list(self.inputs.values()))
        self._replay_forward()
        return tuple(output.clone() for output in self.outputs)

    def backward(self, output_gradients: Tensors) -> list[torch.Tensor | None]:
        """Compute the parameters' gradients, None where nothing depends on one; new tensors."""
        pairs = zip(output_gradients, self.is_differentiable, strict=True)
        _copy([gradient for gradient, is_so in pairs if is_so], self.output_gradients)
        self._replay_backward()
        found = zip(self.shared.gradients, self.is_used, strict=True)
        return [gradient.clone() if is_used else None for gradient, is_used in found]


def trained_parameters(networks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters that get a gradient."""
    return [p for p in nn.ModuleList(networks).parameters() if p.requires_grad]


def _distance(found: Tensors, expected: Tensors) -> float:
    """Root of the sum of squares of the results' errors, each over its result's size.

    One figure for all: a single result may be equal in two passes and not in the third.
    """
    return math.sqrt(sum(_relative_error(*pair) ** 2 for pair in zip(found, expected, strict=True)))


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    if torch.allclose(found, expected, rtol=0.0, atol=0.0, equal_nan=True):
        return 0.0
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(error.nan_to_num(math.inf))


def _copy(new: Tensors, kept: Tensors) -> None:
    for value, place in zip(new, kept, strict=True):
        place.copy_(value)


def _addresses(parameters: Sequence[nn.Parameter]) -> list[int]:
    return [parameter.data_ptr() for parameter in parameters]


class Unfinished:
    """Lives as long as a forward pass whose backward pass may still come."""


class _Context(FunctionCtx):
    captured: CapturedPass
    unfinished: list[Unfinished]


class Replay(torch.autograd.Function):
    """A captured pass, whose backward runs once; ``unfinished`` holds its only token."""

    @staticmethod
    def forward(
        ctx: "_Context",
        captured: CapturedPass,
        inputs: Inputs,
        unfinished: list[Unfinished],
        *parameters: nn.Parameter,
    ) -> tuple[torch.Tensor, ...]:
        """Replay the forward pass."""
        ctx.captured, ctx.unfinished = captured, unfinished
        outputs = captured.forward(inputs)
        pairs = zip(outputs, captured.is_differentiable, strict=True)
        ctx.mark_non_differentiable(*(output for output, is_so in pairs if not is_so))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: "_Context", *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Replay the backward pass."""
        if not ctx.unfinished:
            raise RuntimeError("a captured pass goes backward once")
        ctx.unfinished.clear()
        return None, None, None, *ctx.captured.backward(gradients)
