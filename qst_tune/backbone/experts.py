"""The experts of a mixture: 4-bit codes of all in one tensor, or a linear layer each.

Notation: E experts, each with a weight ``[O, I]``.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.quantization.nf4 import (
    QuantType,
    dequantize_nf4,
    nf4_from_parts,
    quantize_nf4,
)

_aten = torch.ops.aten
# Of torchao's NF4Tensor, in the order of its constructor; the last is the same for all experts.
_PARTS = ("quantized_scalers", "quantization_factor", "scaler_mean", "quantized_data", "nf4")


class QuantizedExperts(torch.Tensor):
    """A weight ``[E, O, I]`` that decodes an expert where it is used.

    transformers keeps the experts of a layer in one parameter and indexes it: ``weight[e]`` gives a
    dense ``[O, I]`` here, so one expert is dense at a time. Every other operation (Llama 4
    multiplies all experts at once) sees the dense weight of this layer, for as long as it runs. It
    is frozen: no gradient flows through it. ``parts`` are absmax codes, their factors, their means
    and codes, ``[E, ...]`` each, and the 16 levels.
    """

    parts: list[torch.Tensor]
    quantization: QuantType

    @staticmethod
    def __new__(
        cls, parts: list[torch.Tensor], shape: tuple[int, ...], quantization: QuantType
    ) -> "QuantizedExperts":
        """Make the tensor without memory of its own."""
        levels = parts[-1]
        made: QuantizedExperts = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=levels.dtype, device=levels.device
        )
        made.parts, made.quantization = parts, quantization
        for name, part in zip(_PARTS, parts, strict=True):
            setattr(made, name, part)
        return made

    def expert(self, index: int) -> NF4Tensor:
        """Return one expert's weight ``[O, I]``, as codes."""
        *own, levels = self.parts
        return nf4_from_parts(self.shape[1:], [*(part[index] for part in own), levels])

    def dense(self) -> torch.Tensor:
        """Decode all experts to ``[E, O, I]``."""
        return torch.stack([dequantize_nf4(self.expert(index)) for index in range(len(self))])

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes an argument
        return f"QuantizedExperts(shape={tuple(self.shape)}, quantization={self.quantization!r})"

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return list(_PARTS), {"quantization": self.quantization}

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, torch.Tensor], context: dict[str, Any], shape: Any, stride: Any
    ) -> "QuantizedExperts":
        return QuantizedExperts([parts[name] for name in _PARTS], tuple(shape), **context)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the disabled one
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Move the codes; decode one expert, or all where the operation is not an index."""
        if func is _aten.detach.default:
            return cls(args[0].parts, tuple(args[0].shape), args[0].quantization)
        to_dtype, device = (kwargs or {}).get("dtype"), (kwargs or {}).get("device")
        if func is _aten._to_copy.default and to_dtype in (None, args[0].dtype):
            moved = [part.to(device, copy=True) for part in args[0].parts]
            return cls(moved, tuple(args[0].shape), args[0].quantization)
        if func is _aten.select.int and args[1] == 0:
            return dequantize_nf4(args[0].expert(args[2]))
        return with_dense(cls, func, args, kwargs)


def with_dense(kinds: Any, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Call an operation with the decoded weights of all arguments of these types."""
    args, kwargs = tree_map(
        lambda v: v.dense() if isinstance(v, kinds) else v, (args, kwargs or {})
    )
    return func(*args, **kwargs)


def quantize_experts(weight: torch.Tensor, quant_type: QuantType) -> QuantizedExperts:
    """Quantise a layer's experts ``[E, O, I]``, perhaps on meta, each with ``quantize_nf4``."""
    if weight.is_meta:  # all alike: an estimate builds models of thousands of experts
        experts = [quantize_nf4(weight[0], quant_type)] * len(weight)
    else:
        experts = [quantize_nf4(expert, quant_type) for expert in weight]
    stacked = [torch.stack([getattr(e, name) for e in experts]) for name in _PARTS[:-1]]
    return QuantizedExperts([*stacked, experts[0].nf4], tuple(weight.shape), quant_type)


_PRODUCTS = ("matmul", "__matmul__", "mm")


class ExpertLinears(nn.Module):
    """Replaces a parameter ``[E, O, I]`` by E linear layers, each of any format.

    An index gives one expert's weight, not decoded: a product with it is its linear layer's, so
    that one expert is decoded at a time and scales get their gradient. For every other operation
    the weight is decoded to ``dtype``, also with its gradient. ``is_transposed``: the model
    multiplies ``x W`` and has ``[E, I, O]``, as gpt-oss does.
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


class JoinedLinear(nn.Module):
    """Linear layers whose outputs are joined, as gate and up that a directory stores apart."""

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__()
        self.parts: Any = nn.ModuleList(parts)
        self.in_features: int = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply each layer to the same input."""
        return torch.cat([part(x) for part in self.parts], dim=-1)

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Decode the weight ``[O, I]``."""
        return torch.cat([part.dense_weight(dtype) for part in self.parts])


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
