"""What a CUDA graph does, on a CPU: operations are recorded, and done again on the same memory.

Python runs once: what it reads while it records, such as a length, stays. An operation that would
wait for a GPU cannot be recorded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qst_tune.modules.captured_passes import CapturedPasses

_aten = torch.ops.aten
_WAIT = {
    _aten._local_scalar_dense, _aten.equal, _aten.is_nonzero, _aten.nonzero, _aten.masked_select,
    _aten._unique2, _aten.bincount,
}  # fmt: skip
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_}


class _Operations(TorchDispatchMode):
    """Does operations, and keeps those that make values."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args):
            raise RuntimeError(f"{func} waits for the device")
        result = func(*args, **kwargs)
        is_view = any(value.alias_info is not None for value in func._schema.returns)
        is_empty = "empty" in func.overloadpacket.__name__
        if func._schema.is_mutable or not (is_view or is_empty):
            self.done.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # the casts are among the operations
    def again(self) -> None:
        """Do all of them, each into the memory of its first result."""
        for func, args, kwargs, first in self.done:
            result = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for kept, new in zip(tree_leaves(first), tree_leaves(result), strict=True):
                    if isinstance(kept, torch.Tensor):
                        kept.copy_(new)


def _waits(func: Any, args: Any) -> bool:
    if func.overloadpacket in _INDEXED:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return func.overloadpacket in _WAIT


class StandInGraphs:
    """Takes the place of ``CudaGraphs``; counts records and replays."""

    device = torch.device("cpu")
    num_records = 0
    num_replays = 0

    def rehearse(self, work: Callable[[], object]) -> None:
        with _Operations():
            work()

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        """Also do the work, which a GPU does not."""
        with _Operations() as operations:
            work()
        self.num_records += 1

        def replay() -> None:
            self.num_replays += 1
            operations.again()

        return replay

    def same_random_numbers(self):
        return torch.random.fork_rng([])

    def pool_bytes(self) -> int:
        return 0


def stand_in_passes() -> tuple[CapturedPasses, StandInGraphs]:
    """Captured passes, and the device that records them."""
    device = StandInGraphs()
    return CapturedPasses(lambda _: device), device
