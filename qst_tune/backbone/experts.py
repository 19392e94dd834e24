"""The experts of a mixture, in one frozen tensor of 4-bit codes.

Notation: E experts, each with a weight ``[O, I]``.
"""

from typing import Any

import torch
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
    is frozen: no gradient flows through it.

    Args:
        parts (list[torch.Tensor]): absmax codes, their factors, their means and codes, ``[E, ...]``
            each, and the 16 levels.
        shape (tuple[int, ...]): ``(E, O, I)``.
        quantization (QuantType): "nf4" or "fp4".
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
        one = quantize_nf4(weight[0], quant_type)
        parts = [getattr(one, name) for name in _PARTS[:-1]]
        stacked = [part.new_empty(len(weight), *part.shape) for part in parts]
        return QuantizedExperts([*stacked, one.nf4], tuple(weight.shape), quant_type)
    experts = [quantize_nf4(expert, quant_type) for expert in weight]
    stacked = [torch.stack([getattr(e, name) for e in experts]) for name in _PARTS[:-1]]
    return QuantizedExperts([*stacked, experts[0].nf4], tuple(weight.shape), quant_type)
