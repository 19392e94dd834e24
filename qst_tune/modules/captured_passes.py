"""Small batches whose shapes repeat run as CUDA graphs: two launches instead of thousands.

A step of few tokens is limited by Python and launches, not by the device. Its forward and backward
pass are recorded for each shape that has come up a few times, and replayed from then on, and so is
the forward pass of validation: the same kernels in the same order, so the same bits.
"""

import time
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torchtune import utils

from qst_tune.errors import first_line
from qst_tune.modules.captured_pass import (
    CapturedPass,
    Compute,
    Inputs,
    Recorder,
    Replay,
    SharedTensors,
    Unfinished,
    trained_parameters,
)
from qst_tune.modules.cuda_graph import CudaGraphs, autocast_state, autocast_without_cache
from qst_tune.torchtune_compat import Mask

# With more the device is slower than Python.
MOST_TOKENS = 4096
# A graph of layers that train holds all that they save and compute again: 2.0 GiB beside a step's
# 4.2 GiB at 7B, for 2 x 2048 tokens and LoRA in a quarter of the layers (H200).
MOST_TOKENS_WITH_LORA = 2048
# Padded to multiples of 16, rows of up to 512 tokens have 32 lengths; to train and to validate.
MOST_SHAPES = 64
# Plain passes of a shape before it is recorded: what is made at first use exists by then.
PLAIN_PASSES = 2

log = utils.get_logger("INFO")


class Device(Recorder, Protocol):
    """What passes are captured on."""

    def pool_bytes(self) -> int:
        """Return the memory that all records share."""


class CapturedPasses:
    """Captures the passes of one model that come up again, and replays them.

    What cannot be captured, because it waits for the device for example, runs as without it: after
    the first failure, which a warning names, nothing is captured. ``make_device`` is called once,
    with the device of the tokens.
    """

    def __init__(self, make_device: Callable[[torch.device], Device] = CudaGraphs) -> None:
        self.make_device = make_device
        self.fault: str | None = None
        self.passes: dict[Hashable, CapturedPass] = {}
        self._device: Device | None = None
        self._shared: dict[Hashable, SharedTensors] = {}
        self._seen: Counter[Hashable] = Counter()
        self._last: Callable[[], Unfinished | None] = lambda: None

    def pool_bytes(self) -> int:
        """Return the memory that the graphs hold between passes."""
        return 0 if self._device is None else self._device.pool_bytes()

    def run(
        self,
        compute: Compute,
        recordable: Compute,
        networks: Sequence[nn.Module],
        state: Hashable,
        tokens: torch.Tensor,
        **where: Mask | None,
    ) -> tuple[torch.Tensor, ...]:
        """Return what ``compute(tokens, **where)`` does, with gradients for what trains.

        That is parameters of ``networks``; in no-grad mode there are none. ``recordable`` computes
        the same as a graph can hold it. ``state`` is equal where equal inputs mean the same
        computation.
        """
        captured = self._captured(recordable, networks, state, tokens, **where)
        if captured is None:
            return self._plain(compute, tokens, **where)
        inputs = {name: value for name, value in where.items() if isinstance(value, torch.Tensor)}
        inputs["tokens"] = tokens
        if not torch.is_grad_enabled():
            return captured.forward(inputs)
        token = Unfinished()
        self._last = weakref.ref(token)
        outputs: tuple[torch.Tensor, ...] = Replay.apply(  # type: ignore[no-untyped-call]
            captured, inputs, [token], *captured.parameters
        )
        return outputs

    def _plain(
        self, compute: Compute, tokens: torch.Tensor, **where: Mask | None
    ) -> tuple[torch.Tensor, ...]:
        """Compute as if nothing was captured: a plain pass cannot use the memory of graphs."""
        try:
            return compute(tokens, **where)
        except torch.OutOfMemoryError as error:
            if not self.passes:
                raise
            self._give_up(error)
        # After the except block: until it ends, the error keeps the failed pass's tensors alive.
        torch.cuda.empty_cache()
        return compute(tokens, **where)

    def _captured(
        self,
        compute: Compute,
        networks: Sequence[nn.Module],
        state: Hashable,
        tokens: torch.Tensor,
        **where: Mask | None,
    ) -> CapturedPass | None:
        """The pass of these inputs if there is one, or it is time to capture it."""
        inputs = {"tokens": tokens}
        for name, value in where.items():
            if type(value) is torch.Tensor:
                inputs[name] = value
            elif value is not None:
                return None
        trains, parameters = torch.is_grad_enabled(), trained_parameters(networks)
        is_usual = (len(parameters) > 0 or not trains) and not torch.is_inference_mode_enabled()
        # What one pass keeps for its backward pass, the next one overwrites.
        is_free = self.fault is None and self._last() is None
        if not (is_usual and is_free and tokens.numel() <= MOST_TOKENS):
            return None
        kinds = [(name, value.shape, value.dtype, value.device) for name, value in inputs.items()]
        key = (state, trains, autocast_state(tokens.device.type), *kinds)
        if key in self.passes and not self.passes[key].fits(parameters):
            del self.passes[key]
        if key not in self.passes and self._is_due(key):
            with autocast_without_cache(tokens.device.type):
                self._capture(key, compute, networks, parameters, inputs)
        return self.passes.get(key)

    def _is_due(self, key: Hashable) -> bool:
        self._seen[key] += 1
        return self._seen[key] > PLAIN_PASSES and len(self.passes) < MOST_SHAPES

    def _capture(
        self,
        key: Hashable,
        compute: Compute,
        networks: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        inputs: Inputs,
    ) -> None:
        start = time.perf_counter()
        try:
            device = self._device or self.make_device(inputs["tokens"].device)
            self._device = device
            shared = self._shared_by(parameters)
            captured = CapturedPass(compute, inputs, networks, shared, device)
            gib = self.pool_bytes() / 2**30
        except Exception as error:  # of the driver, of the model's own code, of any kind
            self._give_up(error)
            return
        self.passes[key] = captured
        rows, length = inputs["tokens"].shape
        what = "batches" if torch.is_grad_enabled() else "validation batches"
        utils.log_rank_zero(
            log,
            f"{what} of {rows} x {length} tokens run as a CUDA graph from now on: recorded in "
            f"{time.perf_counter() - start:.1f} s, {gib:.2f} GiB for all",
        )

    def _shared_by(self, parameters: Sequence[nn.Parameter]) -> SharedTensors:
        key = tuple(map(id, parameters))
        if key not in self._shared:
            self._shared[key] = SharedTensors(parameters, MOST_TOKENS)
        return self._shared[key]

    def _give_up(self, error: Exception) -> None:
        self.fault = f"{first_line(error)} ({_place_of(error)})"
        self.passes.clear()
        self._shared.clear()
        self._device = None
        log.warning(f"steps are not captured as CUDA graphs, which makes them slower: {self.fault}")


def _place_of(error: Exception) -> str:
    """The line of code that raised it, which is the model's or a library's."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
