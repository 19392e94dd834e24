"""The fastest of several ways to compute the same on a GPU, found out once by running them."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import median

import torch
from torchtune import utils

from qst_tune.errors import first_line

log = utils.get_logger("INFO")

Compute = Callable[[], torch.Tensor]

_ROUNDS = 7
# Of the norm of the result: kernels that round a weight, or do not, differ by 0.002.
_TOLERANCE = 0.02
# More than the cache of any GPU: in a model a weight is read from memory.
_MOST_CACHE = 2**27
_FILLS = 6  # some 300 us


def fastest(known: Compute, others: Sequence[Compute]) -> int | None:
    """Return the index of the fastest of ``others`` that is faster than ``known``, or None.

    Times are the GPU's alone, of CUDA graphs: Python takes longer than such kernels. What fails,
    or has another result than ``known``, is reported and not chosen.
    """
    expected = known()
    try:
        best, least = None, _milliseconds(known, expected.device)
    except Exception as error:  # a GPU that records nothing
        log.warning(f"kernels for products of few tokens cannot be timed here: {first_line(error)}")
        return None
    for index, other in enumerate(others):
        try:
            fault = _difference(other(), expected)
            taken = _milliseconds(other, expected.device)
        except Exception as error:  # of Triton's compiler, of the driver, of any kind
            fault = f"{type(error).__name__}: {first_line(error)}"
        if fault is not None:
            _report(fault)
        elif taken < least:
            best, least = index, taken
    return best


@lru_cache(maxsize=8)  # once a fault, not once a weight's shape and tile
def _report(fault: str) -> None:
    log.warning(f"a kernel for products of few tokens is not used here: {fault}")


def _difference(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    share = float((found.double() - expected.double()).norm() / expected.double().norm())
    return None if share <= _TOLERANCE else f"its results differ by {share:.3g} of their size"


def _milliseconds(compute: Compute, device: torch.device) -> float:
    """Time a function that has run before, without what it left in the GPU's cache."""
    # Whichever is the current device; where it fails, torch.cuda.graph leaves its stream in use.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        return _milliseconds_here(compute, device)


@lru_cache(maxsize=32)
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one to record in: torch's own belongs to the device that recorded first."""
    return torch.cuda.Stream(device)


def _milliseconds_here(compute: Compute, device: torch.device) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"):
        compute()
    free, _ = torch.cuda.mem_get_info(device)
    other = torch.empty(min(_MOST_CACHE, free // 4), dtype=torch.uint8, device=device)
    times: list[float] = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_FILLS):  # the graph is launched before they end
            other.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)
