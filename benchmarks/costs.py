"""Memory, floating-point operations and time in matrix products of one step, in a fresh process."""

import ctypes
import gc
import inspect
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from benchmarks.backbones import Backbone
from benchmarks.methods import METHODS, Batch, Trainee, ignore_known_warnings, random_batch
from benchmarks.timing import Shape
from qst_tune.modules.memory import optimizer_bytes, parameter_bytes, peak_memory_bytes

_aten = torch.ops.aten
# torch's counter knows the attention kernels of CUDA only; CPU's do the same products. It wraps the
# formulas that it is given, and its own are wrapped already.
_CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: inspect.unwrap(sdpa_flop),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: inspect.unwrap(sdpa_backward_flop),
}
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
# Narrower products belong to an adapter or to a side network (r is 8 or more).
_WIDEST_SIDE = 8


@dataclass(frozen=True)
class Cost:
    """What one training step of a method takes.

    Args:
        frozen_bytes (int): weights that do not train, and buffers.
        peak_bytes (int): most that torch's allocator had given out at once, weights included.
        peak_rss_bytes (int): most that the process had resident, Python and libraries included.
        flops_per_token (float): of all matrix products; causal attention counts in full.
        seconds (float): of the profiled step, which is somewhat slower than a plain one.
        product_seconds (float): of these in matrix products and attention.
        backbone_product_seconds (float): of these in those of backbone and head.
        operation_seconds (dict[str, float]): the same step by operation, the longest first.
    """

    frozen_bytes: int
    peak_bytes: int
    peak_rss_bytes: int
    flops_per_token: float
    seconds: float
    product_seconds: float
    backbone_product_seconds: float
    operation_seconds: dict[str, float]


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Args:
        method (str): key of :data:`~benchmarks.methods.METHODS`.
        backbone (Backbone): what it trains.
        shapes (tuple[Shape, ...]): in this order.
        threads (int): of torch.
    """

    method: str
    backbone: Backbone
    shapes: tuple[Shape, ...]
    threads: int


def measure_in_new_process(job: Job) -> Iterator[tuple[Shape, Cost]]:
    """Run a job in a process of its own and hand over each result as it comes.

    Args:
        job (Job): what to measure.

    Yields:
        tuple[Shape, Cost]: one per shape.

    Raises:
        RuntimeError: if the process dies, say for lack of memory; what came before is valid.
    """
    # A server that has torch imported forks the processes: fresh ones, without the 8 s of import.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.costs"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(job, sender))
    process.start()
    sender.close()
    with suppress(EOFError):
        while True:
            yield receiver.recv()
    process.join()
    if process.exitcode:
        raise RuntimeError(
            f"measuring the memory of {job.method} ended with status {process.exitcode}"
        )


def _measure_and_send(job: Job, sender: Connection) -> None:
    ignore_known_warnings()
    torch.set_num_threads(job.threads)
    trainee = METHODS[job.method].build(job.backbone)
    with METHODS[job.method].running(trainee):
        for shape in job.shapes:
            sender.send((shape, measure(trainee, job.backbone, shape)))
    sender.close()


def measure(trainee: Trainee, backbone: Backbone, shape: Shape) -> Cost:
    """Measure one step in this process.

    Args:
        trainee (Trainee): takes two steps.
        backbone (Backbone): what it trains.
        shape (Shape): of the batch.

    Returns:
        Cost: of the second step.
    """
    # Operations a token are the same for one row; the step also makes the optimizer's states.
    one_row = random_batch(backbone, 1, shape.num_tokens, seed=0)
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        trainee.step(one_row)
    batch = random_batch(backbone, shape.batch_size, shape.num_tokens, seed=1)
    start_bytes = allocated_bytes(trainee, batch)
    _forget_peak()
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True
    ) as profiler:
        start = time.perf_counter()
        trainee.step(batch)
        seconds = time.perf_counter() - start
    peak_rss_bytes = peak_resident_bytes()
    events = profiler.key_averages(group_by_input_shape=True)
    return Cost(
        frozen_bytes=frozen_bytes(trainee),
        peak_bytes=start_bytes + peak_of_profile(profiler),
        peak_rss_bytes=peak_rss_bytes,
        flops_per_token=counter.get_total_flops() / shape.num_tokens,
        seconds=seconds,
        product_seconds=_sum_seconds(events, is_product),
        backbone_product_seconds=_sum_seconds(
            events, lambda event: is_product(event) and _is_wide(event, backbone)
        ),
        operation_seconds=_by_operation(events),
    )


# Memory.


def frozen_bytes(trainee: Trainee) -> int:
    """Count what a model holds without training it.

    Args:
        trainee (Trainee): the model.

    Returns:
        int: bytes of frozen parameters and of buffers.
    """
    return parameter_bytes(trainee.model) - sum(p.nbytes for p in trainee.trained)


def allocated_bytes(trainee: Trainee, batch: Batch) -> int:
    """Count what exists between two steps.

    Args:
        trainee (Trainee): after at least one step.
        batch (Batch): the next one.

    Returns:
        int: bytes of weights, optimizer states and batch.
    """
    tokens = sum(tensor.nbytes for tensor in batch.values())
    return parameter_bytes(trainee.model) + optimizer_bytes(trainee.optimizer) + tokens


def peak_of_profile(profiler: profile) -> int:
    """Find how far the allocator went above where it was when the profile began.

    Args:
        profiler (profile): finished, with ``profile_memory``.

    Returns:
        int: bytes.
    """
    # Each call of the allocator is an event with the bytes given (or taken back, negative). The
    # profiler's tables sum them up by operation, which has no peak; the raw list does.
    assert profiler.profiler is not None
    raw: Any = profiler.profiler.kineto_results
    events = [event for event in raw.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def peak_resident_bytes() -> int:
    """Return the most that this process had resident since :func:`_forget_peak`.

    Returns:
        int: bytes; where the system cannot forget a peak (not Linux), of the whole process.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_memory_bytes(torch.device("cpu"))


def _forget_peak() -> None:
    """Give freed memory back to the system, and let it count the peak from here."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5")


# Time by operation.


def is_product(event: Any) -> bool:
    """Tell whether an operation of a profile is a matrix product or attention.

    Args:
        event (Any): of ``key_averages``.

    Returns:
        bool: True if it is.
    """
    return event.key in _PRODUCTS or event.key.startswith(_ATTENTION)


def _is_wide(event: Any, backbone: Backbone) -> bool:
    """Tell whether a product is of the backbone or head, and not of an adapter or side network."""
    shapes = [shape for shape in event.input_shapes if len(shape) >= 2]
    if event.key.startswith(_ATTENTION):
        return bool(shapes[0][-1] == backbone.head_dim)
    narrowest: int = min(size for shape in shapes for size in shape[-2:])
    return narrowest > backbone.embed_dim // _WIDEST_SIDE


def _sum_seconds(events: Any, wanted: Any) -> float:
    microseconds = sum(event.self_cpu_time_total for event in events if wanted(event))
    return float(microseconds) / 1e6


def _by_operation(events: Any, most: int = 15) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for event in events:
        seconds[event.key] = seconds.get(event.key, 0.0) + event.self_cpu_time_total / 1e6
    longest = sorted(seconds, key=lambda key: -seconds[key])[:most]
    return {key: seconds[key] for key in longest}
