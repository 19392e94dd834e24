"""Data parallelism: every process has the whole model, and gradients are summed once a step."""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from qst_tune.errors import USER_ERROR_STATUS, UserError
from qst_tune.terminal import print_errors

T = TypeVar("T")


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started; does nothing for a single process.

    Tensors on CUDA go by NCCL, those on the CPU by Gloo. UserError if another process has died.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    # Counters of the validation set may be on the CPU, whatever the model is on.
    _join("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo")
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_process(error):
            raise
        raise UserError(
            f"process {dist.get_rank()} has lost another process of this run, which has died or "
            f"cannot be reached ({_reason(error)}): the run ends. The last checkpoint is whole; "
            "resume_from_checkpoint=True resumes from it"
        ) from error
    finally:
        dist.destroy_process_group()


def _join(backend: str) -> None:
    # Processes that torchrun has started again on one machine meet in the store of the first start
    # (torch 2.13), where Gloo finds the addresses of the dead: what is theirs gets a prefix. On
    # several machines the number of restarts is each agent's own, and cannot do that.
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        dist.init_process_group(backend)
        return
    store, rank, world_size = next(rendezvous("env://"))
    own = dist.PrefixStore(f"restart_{restarts}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=world_size)


def _is_lost_process(error: RuntimeError) -> bool:
    """Gloo has no error type of its own; its messages name its source file."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _reason(error: RuntimeError) -> str:
    """The first sentence, without the place in the source file that Gloo begins with."""
    return re.sub(r"^\[\S*\] ", "", " ".join(str(error).split())).partition(". ")[0]


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's number and how many there are; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main_process() -> bool:
    """Whether this is the process that prints and writes: the first one, or the only one."""
    return rank_and_world_size()[0] == 0


def broadcast_tensors(module: nn.Module) -> None:
    """Give every process the tensors of the first, in place. Collective: call it on all ranks."""
    if dist.is_initialized():
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=0)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place. Collective: call it on all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def sum_or_fail(values: torch.Tensor, error: UserError | None) -> torch.Tensor:
    """Sum a tensor over all processes, in place, unless one of them has failed. Collective.

    A failed process passes its ``error``, so that the others do not wait for it. Raises the error
    of a single process; of several, prints it and raises SystemExit with status 2 on all.
    """
    if not dist.is_initialized():
        if error is not None:
            raise error
        return values  # untouched: a look at it would wait for the device
    if error is not None:
        print_errors(str(error).splitlines())
        sys.stderr.flush()
    failed = values.new_tensor([error is not None])
    summed = sum_over_ranks(torch.cat([values.flatten(), failed]))
    if summed[-1]:
        raise SystemExit(USER_ERROR_STATUS)
    values.copy_(summed[:-1].view_as(values))
    return values


def gather_lists(values: list[T]) -> list[T]:
    """Join the lists of all processes, in order. Collective; tensors in them are on the CPU."""
    if not dist.is_initialized():
        return values
    gathered: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, values)
    return [value for part in gathered for value in part]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over all processes, in place and in one message. Collective.

    A gradient that is None counts as zero, so that ranks agree on the message.
    """
    if not dist.is_initialized():
        return
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
