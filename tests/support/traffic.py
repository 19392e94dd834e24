"""Count what crosses processes, every collective with its dtype and bytes, and what stays whole."""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Collectives of this process, in order: name, dtype, bytes that this process puts in."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            # An all-gather's output comes first.
            inputs = args[1:2] if "allgather" in str(func) else args
            tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
            num_bytes = sum(tensor.nbytes for tensor in tensors)
            self.messages.append((func._opname, tensors[0].dtype, num_bytes))
        return func(*args, **(kwargs or {}))


def left_whole(model: nn.Module) -> list[str]:
    """Names of the modules that FSDP has gathered, or begun to, and not freed."""
    sharded = {name: m for name, m in model.named_modules() if isinstance(m, FSDPModule)}
    return [
        name
        for name, module in sharded.items()
        for group in module._get_fsdp_state()._fsdp_param_groups
        if group.is_unsharded or group._all_gather_result is not None
    ]
