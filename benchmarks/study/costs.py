"""What a step of each method of the study takes: time by turns on the same batches, and memory."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.costs import peak_of_profile
from benchmarks.methods import ignore_known_warnings
from benchmarks.study.experiment import Place, optimizer_of, train_step
from benchmarks.study.learners import Learner, fast_decoding
from benchmarks.study.methods import METHODS
from benchmarks.study.tasks import Task
from qst_tune.modules.captured_passes import PLAIN_PASSES, CapturedPasses
from qst_tune.modules.memory import optimizer_bytes, parameter_bytes
from qst_tune.modules.qst_model import QSTModel

Batch = dict[str, torch.Tensor]
# Of one shape, on a GPU, where passes that come up again are recorded.
_STEPS_TO_CAPTURE = PLAIN_PASSES + 1


@dataclass(frozen=True)
class StepCost:
    """What a step of a method takes.

    Args:
        task (str): name.
        method (str): name.
        batch_size (int): rows a step.
        tokens (float): mean of the batches, padding included.
        seconds (float): median of a step.
        peak_bytes (int): most that torch's allocator had given out at once, weights and optimizer
            included, over the batches.
        device (str): type of the device.
        threads (int): of torch, on a CPU.
    """

    task: str
    method: str
    batch_size: int
    tokens: float
    seconds: float
    peak_bytes: int
    device: str
    threads: int


@dataclass(frozen=True)
class Plan:
    """What to measure: all methods train at once, step by step in turn, on the same batches.

    Args:
        task (Task): whose rows.
        methods (list[str]): names.
        batch_size (int): rows a step.
        rounds (int): steps of each that are timed, after one that is not.
        place (Place): where; states are not kept.
    """

    task: Task
    methods: list[str]
    batch_size: int
    rounds: int
    place: Place


def measure_in_new_process(plan: Plan) -> list[StepCost]:
    """Measure in a process of its own, with as many threads as this one.

    Args:
        plan (Plan): what to measure.

    Returns:
        list[StepCost]: one for each method.
    """
    # torch's profiler announces itself on stderr unless this is there before torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_with_threads, torch.get_num_threads(), plan).result()


def _measure_with_threads(threads: int, plan: Plan) -> list[StepCost]:
    torch.set_num_threads(threads)
    ignore_known_warnings()
    return list(measure(plan))


def measure(plan: Plan) -> Iterator[StepCost]:
    """Measure in this process.

    Args:
        plan (Plan): what to measure.

    Yields:
        StepCost: one for each method.
    """
    batches = list(islice(plan.task.batches(0, plan.batch_size), 1 + plan.rounds))
    pairs = [_start(name, plan.place) for name in plan.methods]
    seconds: list[list[float]] = [[] for _ in pairs]
    untimed = _STEPS_TO_CAPTURE if plan.place.device.type == "cuda" else 0
    with fast_decoding():
        for turn, batch in enumerate(batches):
            for i in range(len(pairs)):
                which = (turn + i) % len(pairs)  # nobody is always the first
                for _ in range(untimed):
                    train_step(*pairs[which], batch)
                wait_for(plan.place.device)
                start = time.perf_counter()
                train_step(*pairs[which], batch)
                wait_for(plan.place.device)
                seconds[which].append(time.perf_counter() - start)
        peaks = [max(_peak_bytes(*pair, batch) for batch in batches[1:]) for pair in pairs]
    tokens = sum(batch["tokens"].numel() for batch in batches[1:]) / plan.rounds
    for name, times, peak in zip(plan.methods, seconds, peaks, strict=True):
        yield StepCost(
            plan.task.name,
            name,
            plan.batch_size,
            tokens,
            median(times[1:]),
            peak,
            plan.place.device.type,
            torch.get_num_threads(),
        )


def wait_for(device: torch.device) -> None:
    """Let a device finish what it was given.

    Args:
        device (torch.device): a CPU has finished.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start(name: str, place: Place) -> tuple[Learner, torch.optim.Optimizer]:
    learner = METHODS[name].build(place.checkpoint, place.device)
    return learner, optimizer_of(learner, METHODS[name].rate)


def _peak_on_cuda(learner: Learner, optimizer: torch.optim.Optimizer, batch: Batch) -> int:
    """Most that a step adds, recorded or replayed: a replay's memory is that of its graphs."""
    passes = CapturedPasses()
    if isinstance(learner.model, QSTModel):
        learner.model.captured_passes = passes  # others record nothing
    torch.cuda.reset_peak_memory_stats(learner.device)
    before = torch.cuda.memory_allocated(learner.device)
    for _ in range(_STEPS_TO_CAPTURE):
        train_step(learner, optimizer, batch)
    recorded = torch.cuda.max_memory_allocated(learner.device)
    torch.cuda.reset_peak_memory_stats(learner.device)
    train_step(learner, optimizer, batch)
    replayed = torch.cuda.max_memory_allocated(learner.device) + passes.pool_bytes()
    return max(recorded, replayed) - before


def _peak_bytes(learner: Learner, optimizer: torch.optim.Optimizer, batch: Batch) -> int:
    """The peak of a step; what the other methods hold is not counted."""
    held = parameter_bytes(learner.model) + optimizer_bytes(optimizer)
    if learner.device.type == "cuda":
        return held + _peak_on_cuda(learner, optimizer, batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_step(learner, optimizer, batch)
    return held + peak_of_profile(profiler)
