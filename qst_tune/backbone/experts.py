"""The experts of a mixture, in one frozen tensor of 4-bit codes.

Notation: E experts, each with a weight ``[O, I]``.
"""

from typing import Any

import torch
from torch.utils._pytree import tree_map
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.quantization.nf4 import QuantType, dequantize_nf4, quantize_nf4

_aten = torch.ops.aten


class QuantizedExperts(torch.Tensor):
    """A weight ``[E, O, I]`` that decodes an expert where it is used.

    transformers keeps the experts of a layer in one parameter and indexes it: ``weight[e]`` gives a
    dense ``[O, I]`` here, so one expert is dense at a time. Every other operation (Llama 4
    multiplies all experts at once) sees the dense weight of this layer, for as long as it runs. It
    is frozen, and right under ``no_grad`` only.

    Args:
        experts (list[NF4Tensor]): E weights of one shape.
        quant_type (QuantType): "nf4" or "fp4".
    """

    experts: list[NF4Tensor]
    quantization: QuantType

    @staticmethod
    def __new__(cls, experts: list[NF4Tensor], quant_type: QuantType) -> "QuantizedExperts":
        """Make the tensor without memory of its own."""
        first = experts[0]
        made: QuantizedExperts = torch.Tensor._make_wrapper_subclass(
            cls, (len(experts), *first.shape), dtype=first.dtype, device=first.device
        )
        made.experts, made.quantization = experts, quant_type
        return made

    def dense(self) -> torch.Tensor:
        """Decode all experts.

        Returns:
            torch.Tensor: ``[E, O, I]``.
        """
        return torch.stack([dequantize_nf4(expert) for expert in self.experts])

    def __repr__(self) -> str:
        return f"QuantizedExperts(shape={tuple(self.shape)}, quantization={self.quantization!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Decode one expert, or all where the operation is not an index."""
        if func is _aten.detach.default:
            return cls(args[0].experts, args[0].quantization)
        if func is _aten.select.int and args[1] == 0:
            return dequantize_nf4(args[0].experts[args[2]])
        decoded = tree_map(_dense, (args, kwargs or {}))
        return func(*decoded[0], **decoded[1])


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, QuantizedExperts) else value


def quantize_experts(weight: torch.Tensor, quant_type: QuantType) -> QuantizedExperts:
    """Quantise the experts of a layer, one after the other.

    Args:
        weight (torch.Tensor): ``[E, O, I]``, may be meta.
        quant_type (QuantType): "nf4" or "fp4".

    Returns:
        QuantizedExperts: each expert as :func:`~qst_tune.quantization.nf4.quantize_nf4` makes it.
    """
    return QuantizedExperts([quantize_nf4(expert, quant_type) for expert in weight], quant_type)
