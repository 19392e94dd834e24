"""CUDA graphs: work on a device that is recorded once, and launched as a whole from then on."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from threading import RLock

import torch


def autocast_state(device_type: str) -> tuple[torch.dtype, bool]:
    """The dtype of a caller's autocast, and whether there is one."""
    return torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)


def autocast_without_cache(device_type: str) -> AbstractContextManager[None]:
    """Let a caller's autocast keep no cast of a weight.

    A graph has to make them itself: weights change, and casts are freed as the autocast ends.
    """
    return torch.autocast(device_type, *autocast_state(device_type), cache_enabled=False)


class CudaGraphs:
    """Records work on a CUDA device; all graphs share one pool of memory.

    So what a graph leaves in the pool is lost as soon as another runs, unless it is in tensors that
    were made outside of graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream, self._lock = _stream_and_lock(device)

    def rehearse(self, work: Callable[[], object]) -> None:
        """Do work once where it will be recorded; RuntimeError if it waits for the device.

        Recording that fails too, but leaves torch in a worse state.
        """
        torch.cuda.empty_cache()  # memory of the usual stream is of no use in this one
        current = torch.cuda.current_stream(self.device)
        with self._lock:
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream), _warnings_known(), _waiting_forbidden():
                    work()
            finally:  # what work reads may be freed, or written, as soon as this returns
                current.wait_stream(self._stream)

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        """Record work without doing it; what is returned does it."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a logger's, are free to use the device meanwhile.
        mode = "thread_local"
        try:
            with (
                self._lock,
                _warnings_known(),
                # torch.cuda.graph leaves its own stream in use where a recording fails.
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode),
            ):
                work()
        except Exception:
            self._renew_generator()
            raise
        replay: Callable[[], None] = graph.replay
        return replay

    def _renew_generator(self) -> None:
        """Give the device's generator a state that knows nothing of a recording that failed.

        Else the next random number is refused: "Offset increment outside graph capture".
        """
        index = self.device.index
        number = torch.cuda.current_device() if index is None else index
        generator = torch.cuda.default_generators[number]
        generator.graphsafe_set_state(generator.clone_state())

    def same_random_numbers(self) -> AbstractContextManager[None]:
        """Let what follows draw the numbers that it would draw without the work in here."""
        return torch.random.fork_rng([self.device])

    def pool_bytes(self) -> int:
        """Return the size of the pool."""
        segments = torch.cuda.memory_snapshot()
        own = [part for part in segments if tuple(part["segment_pool_id"]) == tuple(self._pool)]
        return sum(part["total_size"] for part in own)


@lru_cache(maxsize=32)
def _stream_and_lock(
    device: torch.device,
) -> tuple[torch.cuda.Stream, AbstractContextManager[bool]]:
    """The stream that all graphs of a device are recorded in, by one thread at a time.

    cuBLAS keeps up to 32 MiB for each stream that it has met: a new one for each text adds up.
    """
    return torch.cuda.Stream(device), RLock()


@contextmanager
def _warnings_known() -> Iterator[None]:
    """Show no warning: work has warned when it was done plainly; torch calls this a prototype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _waiting_forbidden() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
