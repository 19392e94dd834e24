"""Every storage of a training step: when it is allocated, when released, and what it is for.

torch ships ``torch.distributed._tools.mem_tracker.MemTracker``, which tracks much the same. It
splits memory by module and cannot tell which activations outlive the forward pass or which bytes
belong to the loss, so the few lines below keep their own record.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, Literal, get_args

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

Part = Literal[
    "frozen weights",
    "trainable weights",
    "optimizer states",
    "gradients",
    "saved activations",
    "logits and loss",
    "transient",
]
PARTS: tuple[Part, ...] = get_args(Part)
Phase = Literal["setup", "forward", "loss", "loss backward", "backward", "optimizer"]

_aten = torch.ops.aten
# torch counts the attention kernels of CUDA only; CPU's do the same products.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _aten._scaled_dot_product_flash_attention
    ],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass
class _Storage:
    """One allocation: its size, rounded up, and the events that allocated and released it.

    ``part`` is what it is for, if :meth:`StorageTracker.register` named that.
    """

    num_bytes: int
    phase: Phase
    start: int
    end: int | None = None
    part: Part | None = None


@dataclass(frozen=True)
class PeakMemory:
    """The moment at which most memory was allocated.

    ``saved_bytes`` are activations alive at the end of the forward pass, whether or not that is the
    peak, without what the loss saves.
    """

    num_bytes: int  # all of it
    parts: dict[str, int]  # the same bytes by :data:`PARTS`
    phase: str  # when it was
    saved_bytes: int
    start_bytes: int  # allocated before the step: weights, optimizer states, inputs


@dataclass(frozen=True)
class Segment:
    """Changes of the allocated bytes, and operations, from where a layer begins to the next one.

    ``layer`` is None from where a phase begins to its first layer.
    """

    phase: Phase
    layer: int | None
    changes: list[int]
    flops: int


@dataclass(frozen=True)
class Timeline:
    """Bytes allocated before the step, and the changes during it, by phase and in order.

    ``segments`` are the same changes by layer, where the tracker was told of layers.
    """

    start_bytes: int
    phases: list[tuple[Phase, list[int]]]
    segments: Sequence[Segment] = ()

    @classmethod
    def of_segments(cls, start_bytes: int, segments: Sequence[Segment]) -> "Timeline":
        """Put together the changes of each phase."""
        phases = [
            (phase, [change for one in same for change in one.changes])
            for phase, same in groupby(segments, key=lambda one: one.phase)
        ]
        return cls(start_bytes, phases, segments)

    @property
    def flops(self) -> int:
        """Operations of all segments."""
        return sum(segment.flops for segment in self.segments)

    def peaks(self) -> list[int]:
        """Find the peak of each phase in bytes, which includes what was there when it began."""
        alive, peaks = self.start_bytes, []
        for _, changes in self.phases:
            levels = list(accumulate(changes, initial=alive))
            peaks.append(max(levels))
            alive = levels[-1]
        return peaks


class StorageTracker(TorchDispatchMode):
    """Record the allocations and floating-point operations of the code that runs under it.

    A storage counts once, however many views it has, from the operation that returns it until the
    last reference to it is gone. So in-place operations count nothing and autograd's own references
    count as alive. Memory that a kernel takes and returns within one operation is only seen where
    ``workspace`` names it.

    It works on real, fake and meta tensors alike. :meth:`register` adds what exists already. Sizes
    are rounded up to a multiple of ``granularity``, of which CUDA's allocator has 512 bytes.
    ``workspace`` has the bytes that an operation (``aten.x``) takes besides its results, as a
    function of its arguments.
    """

    def __init__(
        self, granularity: int = 1, workspace: Mapping[Any, Callable[..., int]] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._granularity = granularity
        self._workspace = workspace or {}
        self._storages: list[_Storage] = []
        self._num_events = 0
        self._phases: list[tuple[int, Phase]] = [(0, "setup")]
        # Of each segment the first event, the operations before it, its phase and its layer.
        self._marks: list[tuple[int, int, Phase, int | None]] = [(0, 0, "setup", None)]
        self._flops, self._times = 0, 1
        self._alive: dict[int, tuple[weakref.ref[Any], _Storage]] = {}

    def enter(self, phase: Phase) -> None:
        """Begin a phase of the step."""
        self._phases.append((self._num_events, phase))
        self.enter_layer(None)

    def enter_layer(self, layer: int | None) -> None:
        """Begin a layer, or its next rows, in the forward or the backward pass."""
        if self._marks[-1][2:] != (self.phase, layer):
            self._marks.append((self._num_events, self._flops, self.phase, layer))

    @property
    def phase(self) -> Phase:
        """The phase that runs now."""
        return self._phases[-1][1]

    def repeat(self, times: int) -> None:
        """Count each of the next operations so many times, for skipped parts of a loop."""
        self._times = times

    def register(self, tensors: object, part: Part) -> None:
        """Name the part of tensors, in any nesting; new ones count from now on."""
        for storage in self._storages_of(tensors):
            self._track(storage).part = part

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls, and nothing to see
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # the plain tensors inside come by on their own
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in _FLOPS:
            self._flops += self._times * _FLOPS[packet](*args, **(kwargs or {}), out_val=result)
        if packet in self._workspace:
            self._release(self._allocate(self._workspace[packet](*args)))
        for storage in self._storages_of(result):
            self._track(storage)
        return result

    def _storages_of(self, tensors: object) -> Iterator[torch.UntypedStorage]:
        for leaf in (tensors,) if isinstance(tensors, torch.Tensor) else tree_iter(tensors):
            if not isinstance(leaf, torch.Tensor):
                continue
            if is_traceable_wrapper_subclass(leaf):
                for name in leaf.__tensor_flatten__()[0]:
                    yield from self._storages_of(getattr(leaf, name))
            else:
                yield leaf.untyped_storage()

    def _track(self, storage: torch.UntypedStorage) -> _Storage:
        key = id(storage)
        if key in self._alive:
            return self._alive[key][1]
        allocation = self._allocate(storage.nbytes())

        def release(_: object) -> None:
            self._alive.pop(key, None)
            self._release(allocation)

        # torch keeps the Python object of a storage alive for as long as the storage itself.
        self._alive[key] = (weakref.ref(storage, release), allocation)
        return allocation

    def _allocate(self, num_bytes: int) -> _Storage:
        blocks = -(-num_bytes // self._granularity)
        allocation = _Storage(blocks * self._granularity, self.phase, self._num_events)
        self._storages.append(allocation)
        self._num_events += 1
        return allocation

    def _release(self, allocation: _Storage) -> None:
        allocation.end = self._num_events
        self._num_events += 1

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products and attention; a multiply-add is two."""
        return self._flops

    def peak(self) -> PeakMemory:
        """Find the peak after :meth:`enter` first left "setup"."""
        start = self._first(lambda phase: phase != "setup")
        end_of_forward = self._first(lambda phase: phase.endswith("backward"))
        levels = list(accumulate(self._changes()))
        num_bytes = max(levels[start:], default=0)
        event = levels.index(num_bytes, start) if levels[start:] else start
        return PeakMemory(
            num_bytes=num_bytes,
            parts=self._parts(event, end_of_forward),
            phase=next(phase for at, phase in reversed(self._phases) if at <= event),
            saved_bytes=self._parts(end_of_forward, end_of_forward)["saved activations"],
            start_bytes=sum(s.num_bytes for s in self._storages if s.start < start),
        )

    def timeline(self) -> Timeline:
        """List the changes after :meth:`enter` first left "setup"."""
        change = self._changes()
        ends = [*self._marks[1:], (len(change), self._flops, self.phase, None)]
        segments = [
            Segment(phase, layer, change[start:end], flops - before)
            for (start, before, phase, layer), (end, flops, *_) in zip(
                self._marks, ends, strict=True
            )
            if phase != "setup"
        ]
        start_bytes = sum(change[: self._first(lambda phase: phase != "setup")])
        return Timeline.of_segments(start_bytes, segments)

    def _first(self, is_meant: Callable[[Phase], bool]) -> int:
        """The event that begins the first such phase; the number of events if there is none."""
        events = (event for event, phase in self._phases if is_meant(phase))
        return next(events, self._num_events)

    def _changes(self) -> list[int]:
        """Changes of the allocated bytes, by event."""
        change = [0] * self._num_events
        for storage in self._storages:
            change[storage.start] += storage.num_bytes
            if storage.end is not None:
                change[storage.end] -= storage.num_bytes
        return change

    def _parts(self, event: int, end_of_forward: int) -> dict[str, int]:
        """Bytes that are alive at an event, by part."""
        parts: dict[str, int] = dict.fromkeys(PARTS, 0)
        for storage in self._storages:
            if storage.start <= event and (storage.end is None or storage.end > event):
                parts[storage.part or _part_of(storage, end_of_forward)] += storage.num_bytes
        return parts


def _part_of(storage: _Storage, end_of_forward: int) -> Part:
    if storage.phase.startswith("loss"):
        return "logits and loss"
    outlives = storage.end is None or storage.end > end_of_forward
    if storage.start < end_of_forward and outlives:
        return "saved activations"
    return "transient"
