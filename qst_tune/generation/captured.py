"""One token of each row as a CUDA graph: recorded once and replayed, without Python or launches."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torchtune import utils

from qst_tune.backbone.masks import positions
from qst_tune.errors import first_line
from qst_tune.modules.cuda_graph import CudaGraphs, autocast_without_cache

log = utils.get_logger("INFO")

Compute = Callable[[], torch.Tensor]
# From a function on tensors that stay where they are to one that does the same again, into the same
# result.
Recorder = Callable[[Compute], Compute]

_LEAST_ROOM = 256


def recorder(device: torch.device) -> Recorder | None:
    """Return what records on this device: CUDA graphs, or nothing."""
    return partial(_recorded, CudaGraphs(device)) if device.type == "cuda" else None


def _recorded(graphs: CudaGraphs, compute: Compute) -> Compute:
    results: list[torch.Tensor] = []
    with autocast_without_cache(graphs.device.type):
        graphs.rehearse(compute)  # refuses what waits for the device, as a model's own code may
        replay = graphs.record(lambda: results.append(compute()))

    def again() -> torch.Tensor:
        replay()
        return results[0]

    return again


class SlotCache(Protocol):
    """Of :class:`~.caches.GrowingCache`, what a recorded step needs."""

    length: int
    slot: torch.Tensor | None

    def reserve(self, room: int) -> bool:
        """Make room for this many tokens; returns whether they are in other tensors now."""


class CapturedStep:
    """A token of each row behind those in the caches: logits, by a recording where that works.

    Token, place, position and mask are in tensors that stay; the caches have room for a power of
    two of tokens, and a step is recorded again when they are full, or had to move. What cannot be
    recorded is reported once and ``is_possible`` becomes false. ``num_steps`` are those of one
    ``shape``, rows and room: the first is not recorded, the second is replayed where it was
    recorded, and the third where the caches are longer.

    ``compute`` takes tokens ``[B, 1]``, a mask ``[B, 1, L]`` and positions ``[B, 1]``.
    """

    def __init__(
        self,
        compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        caches: Sequence[SlotCache],
        record: Recorder,
    ) -> None:
        self.is_possible, self.num_steps = True, 0
        self.shape = (0, 0)
        self._compute, self._caches, self._record = compute, caches, record
        self._is_warm = False
        self._replay: Compute | None = None
        self._inputs: Any = None

    def logits(self, new_B1: torch.Tensor, is_real_BT: torch.Tensor) -> torch.Tensor:
        """Compute the logits ``[B, V]`` behind the last of T tokens; the others are cached."""
        self._take(new_B1, is_real_BT)
        self.num_steps += 1
        logits_BV = self._run()
        for cache in self._caches:
            cache.length = is_real_BT.shape[1]
        return logits_BV

    @staticmethod
    def shape_of(is_real_BT: torch.Tensor) -> tuple[int, int]:
        """Return the rows and the room of a step behind these tokens."""
        num_rows, length = is_real_BT.shape
        return num_rows, max(_LEAST_ROOM, 1 << (length - 1).bit_length())

    def refuse(self, reason: str) -> None:
        """Record no more, and report why."""
        self.is_possible = False
        _report(reason)

    def _take(self, new_B1: torch.Tensor, is_real_BT: torch.Tensor) -> None:
        """Write the inputs of a step."""
        length, (_, room) = is_real_BT.shape[1], self.shape_of(is_real_BT)
        if self.shape != self.shape_of(is_real_BT):
            self._prepare(new_B1, room)
        # A plain pass may have outgrown the room. A list, not a generator: each cache must reserve.
        if any([cache.reserve(room) for cache in self._caches]):
            self._replay = None
        token_B1, slot_1, mask_B1L, position_B1 = self._inputs
        token_B1.copy_(new_B1)
        slot_1.fill_(length - 1)
        mask_B1L.zero_()[:, 0, :length] = is_real_BT
        position_B1.copy_(positions(is_real_BT, 1))

    def _prepare(self, new_B1: torch.Tensor, room: int) -> None:
        self._replay = None  # its memory is free before there is more
        self.shape, self.num_steps = (len(new_B1), room), 0
        slot_1 = new_B1.new_zeros(1)
        mask_B1L = new_B1.new_zeros(len(new_B1), 1, room, dtype=torch.bool)
        self._inputs = torch.empty_like(new_B1), slot_1, mask_B1L, torch.empty_like(new_B1)
        self._is_warm = False

    def _run(self) -> torch.Tensor:
        if self._replay is None and self._is_warm:
            self._replay = self._recorded()
        if self._replay is not None:
            # The next step writes into the same result.
            return self._replay().clone()
        # Kernels are compiled and chosen at the first call, which cannot be recorded.
        self._is_warm = True
        return self._at_slot()

    def _recorded(self) -> Compute | None:
        try:
            return self._record(self._at_slot)
        except Exception as error:  # of the driver, of any operation that waits for the GPU
            self.refuse(f"{type(error).__name__}: {first_line(error)}")
            return None

    def _at_slot(self) -> torch.Tensor:
        token_B1, slot_1, mask_B1L, position_B1 = self._inputs
        for cache in self._caches:
            cache.slot = slot_1
        try:
            return self._compute(token_B1, mask_B1L, position_B1)
        finally:
            for cache in self._caches:
                cache.slot = None


@lru_cache(maxsize=8)  # once a reason
def _report(reason: str) -> None:
    log.warning(f"tokens are generated without a CUDA graph, several times more slowly: {reason}")
