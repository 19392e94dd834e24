"""Time and memory of a device: wall clock around a step, events around a kernel."""

import gc
import time
from collections.abc import Callable
from statistics import median

import torch

GIB = 2**30


class Clock:
    """Measures what runs on one device; a CPU's memory is not measured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"

    def wait(self) -> None:
        """Let the device finish."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Time one call with its launches and Python, until the device has finished."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return 1000 * (time.perf_counter() - start)

    def kernel_milliseconds(self, run: Callable[[], object]) -> float:
        """Median time of a call on the device alone, by events, the cache emptied before each."""
        if not self.is_cuda:
            return median(self.milliseconds(run) for _ in range(5))
        from triton.testing import do_bench

        return float(do_bench(run, warmup=20, rep=100, return_mode="median"))

    def allocated(self) -> int:
        """Bytes of living tensors."""
        return torch.cuda.memory_allocated() if self.is_cuda else 0

    def forget_peak(self) -> None:
        """Count the largest :meth:`peak` from now on."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Most bytes of living tensors since :meth:`forget_peak`."""
        return torch.cuda.max_memory_allocated() if self.is_cuda else 0

    def collect(self) -> None:
        """Return the memory of what is no longer used."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()


class Deadline:
    """An end of time for a section."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    @property
    def is_over(self) -> bool:
        """Whether there is no time left."""
        return time.perf_counter() > self.end


def tflops(clock: Clock, size: int) -> float:
    """Speed of a plain bf16 product of square matrices, 1e12 operations a second."""
    a, b = (torch.randn(size, size, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / clock.kernel_milliseconds(lambda: a @ b) / 1e9
