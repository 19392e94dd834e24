"""Where the memory of a training run goes, counted in bytes and not guessed from the outside."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from qst_tune.modules.plain_parts import named_parts

GIB = 1024**3


@dataclass
class ActivationCount:
    """Bytes saved for backward."""

    num_bytes: int = 0


@contextmanager
def count_saved_activations(exclude: nn.Module) -> Iterator[ActivationCount]:
    """Count the distinct bytes that a forward pass saves for backward, without parameters."""
    count = ActivationCount()
    kept: list[torch.Tensor] = []  # alive until the end, so that no address is used twice
    seen = {p.untyped_storage().data_ptr() for p in _plain_tensors(exclude)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            count.num_bytes += storage.nbytes()
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers below a module as they are stored here, each storage once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _plain_tensors(module)
    }
    return sum(storages.values())


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's state after at least one step, without the parameters."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def memory_parts(
    model: nn.Module, optimizer: Optimizer, activation_bytes: int, device: torch.device
) -> dict[str, float]:
    """Return the peak of a training run and its parts, in GiB by name, after at least one step."""
    trained = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
    reference = getattr(model, "reference_side", None)  # of preference learning
    frozen = parameter_bytes(model) - trained + (parameter_bytes(reference) if reference else 0)
    parts = {
        "peak": peak_memory_bytes(device),
        "frozen weights": frozen,
        "trainable": trained,
        "optimizer": optimizer_bytes(optimizer),
        "activations kept": activation_bytes,
    }
    return {name: size / GIB for name, size in parts.items()}


def memory_kind(device: torch.device) -> str:
    """Name what :func:`peak_memory_bytes` counts."""
    return "CUDA allocator" if device.type == "cuda" else "resident process memory"


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of this run so far: the allocator's on CUDA, the process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _plain_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers; quantized and sharded ones as the plain tensors of this process."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if isinstance(tensor, DTensor):
            yield tensor.to_local()
        else:
            yield from named_parts("", tensor).values()
