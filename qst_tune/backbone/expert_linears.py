"""The experts of a layer as linear layers, where a model of transformers has one weight for all.

Notation: E experts, each with a weight ``[O, I]``.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qst_tune.backbone.experts import QuantizedExperts, with_dense

_PRODUCTS = ("matmul", "__matmul__", "mm")


class ExpertLinears(nn.Module):
    """Replaces a parameter ``[E, O, I]`` by E linear layers, each of any format.

    An index gives one expert's weight, not decoded: a product with it is its linear layer's, so
    that one expert is decoded at a time and scales get their gradient. For every other operation
    the weight is decoded, also with its gradient.

    Args:
        experts (Sequence[nn.Module]): a linear layer each, without bias.
        dtype (torch.dtype): that the weights decode to.
        is_transposed (bool): the model multiplies ``x W`` and has ``[E, I, O]``, as gpt-oss does.
    """

    # Else the _init_weights of some models would draw new weights.
    _is_hf_initialized = True

    def __init__(
        self, experts: Sequence[nn.Module], dtype: torch.dtype, *, is_transposed: bool = False
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.dtype, self.is_transposed = dtype, is_transposed

    @property
    def shape(self) -> torch.Size:
        """That of the parameter: ``[E, O, I]``, or ``[E, I, O]`` if transposed."""
        first: Any = self.experts[0]
        sizes = (first.out_features, first.in_features)
        return torch.Size((len(self.experts), *(sizes[::-1] if self.is_transposed else sizes)))

    def __len__(self) -> int:
        """E."""
        return len(self.experts)

    def __getitem__(self, index: Any) -> "ExpertWeight":
        """One expert's weight; the index may be a tensor of one number."""
        return ExpertWeight(self.experts[int(index)], self.dtype, self.is_transposed)

    def dense(self) -> torch.Tensor:
        """Decode all experts, to the shape of the parameter."""
        return torch.stack([self[index].dense() for index in range(len(self))])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Multiply expert by expert in ``bmm`` (Llama 4), decode for all else."""
        if func is torch.bmm and isinstance(args[1], cls):
            return torch.stack([x @ args[1][index] for index, x in enumerate(args[0])])
        return with_dense(ExpertLinears | ExpertWeight, func, args, kwargs)


class ExpertWeight:
    """The weight of one expert, not decoded; ``is_transposed`` if the model multiplies ``x W``."""

    def __init__(self, linear: Any, dtype: torch.dtype, is_transposed: bool) -> None:
        self.linear, self.dtype, self.is_transposed = linear, dtype, is_transposed

    def dense(self) -> torch.Tensor:
        """Decode the weight, with the gradient of what trains in it."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.linear.parameters()):
            device = next(self.linear.parameters()).device
            unit = torch.eye(self.linear.in_features, dtype=self.dtype, device=device)
            weight: torch.Tensor = self.linear(unit).T
        else:
            weight = self.linear.dense_weight(self.dtype)
        return weight.T if self.is_transposed else weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Apply the expert's linear layer in a product, decode for all else."""
        own = args[1] if len(args) > 1 and isinstance(args[1], cls) else None
        if own is not None and func is F.linear and not own.is_transposed:
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            y = own.linear(args[0])
            return y if bias is None else y + bias
        if own is not None and own.is_transposed and func.__name__ in _PRODUCTS:
            return own.linear(args[0])
        return with_dense(ExpertLinears | ExpertWeight, func, args, kwargs)


class JoinedLinear(nn.ModuleList):
    """Linear layers whose outputs are joined, as gate and up that a directory stores apart."""

    @property
    def in_features(self) -> int:
        """I."""
        return int(self._parts[0].in_features)

    @property
    def out_features(self) -> int:
        """O, of all together."""
        return sum(int(part.out_features) for part in self._parts)

    @property
    def _parts(self) -> list[Any]:
        return list(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply each layer to the same input."""
        return torch.cat([part(x) for part in self._parts], dim=-1)

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Decode the weight ``[O, I]``."""
        return torch.cat([part.dense_weight(dtype) for part in self._parts])


def compile_forward(modules: Iterable[Any]) -> None:
    """Compile what these modules compute, in place, except experts that are decoded one by one.

    Unlike ``nn.Module.compile`` this leaves hooks alone, which are other ones at each pass.
    """
    for module in modules:
        for inner in module.modules():
            parts = [*inner.parameters(recurse=False), *inner.children()]
            if any(isinstance(part, QuantizedExperts | ExpertLinears) for part in parts):
                inner.forward = torch.compiler.disable(inner.forward)
        module.forward = torch.compile(module.forward)
