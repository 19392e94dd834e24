"""The fastest of several ways to compute the same on a GPU, found out once by running them."""

from collections.abc import Callable, Sequence
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

    What fails, or has another result than ``known``, is reported and not chosen.
    """
    expected = known()
    best, least = None, _milliseconds(known, expected.device)
    for index, other in enumerate(others):
        fault = _fault(other, expected)
        if fault is not None:
            log.warning(f"a kernel for products of few tokens is not used here: {fault}")
            continue
        taken = _milliseconds(other, expected.device)
        if taken < least:
            best, least = index, taken
    return best


def _fault(compute: Compute, expected: torch.Tensor) -> str | None:
    try:
        difference = (compute().double() - expected.double()).norm()
        share = float(difference / expected.double().norm())
    except Exception as error:  # of Triton's compiler, of the driver, of any kind
        return f"{type(error).__name__}: {first_line(error)}"
    return None if share <= _TOLERANCE else f"its results differ by {share:.3g} of their size"


def _milliseconds(compute: Compute, device: torch.device) -> float:
    """Time a function without what an earlier call left in the GPU's cache."""
    free, _ = torch.cuda.mem_get_info(device)
    other = torch.empty(min(_MOST_CACHE, free // 4), dtype=torch.uint8, device=device)
    times: list[float] = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_FILLS):  # what follows is launched before they end
            other.zero_()
        start.record()
        compute()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)
