"""Count what crosses processes: every collective with its dtype and bytes."""

from typing import Any

import torch
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
