"""The experts of a mixture as a quantised directory stores them: a weight each, with its codes.

Notation: E experts, each with a weight ``[O, I]``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from qst_tune.modules.base_quantization import QuantizedLinear

_aten = torch.ops.aten


class TakenExperts(torch.Tensor):
    """A frozen weight ``[E, O, I]`` that decodes an expert where it is used.

    As :class:`~qst_tune.backbone.experts.QuantizedExperts`, but of codes that are not ours: each
    expert has offsets and scales of its own, and may be joined of pieces (gate and up).

    Args:
        pieces (Sequence[Sequence[QuantizedLinear]]): for each piece of the rows, the E experts'.
        shape (tuple[int, ...]): ``(E, O, I)``.
        dtype (torch.dtype): that it decodes to.
        device (torch.device): where the codes are.
    """

    pieces: Sequence[Sequence[QuantizedLinear]]

    @staticmethod
    def __new__(
        cls,
        pieces: Sequence[Sequence[QuantizedLinear]],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> "TakenExperts":
        """Make the tensor without memory of its own."""
        made: TakenExperts = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device
        )
        made.pieces = pieces
        return made

    def expert(self, index: int) -> torch.Tensor:
        """Decode one expert.

        Args:
            index (int): which.

        Returns:
            torch.Tensor: ``[O, I]``.
        """
        return torch.cat([experts[index].dense_weight(self.dtype) for experts in self.pieces])

    def dense(self) -> torch.Tensor:
        """Decode all experts.

        Returns:
            torch.Tensor: ``[E, O, I]``.
        """
        return torch.stack([self.expert(index) for index in range(len(self))])

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes an argument
        return f"TakenExperts(shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the disabled one
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Decode one expert, or all where the operation is not an index."""
        first = args[0]
        if func is _aten.detach.default:
            return cls(first.pieces, tuple(first.shape), first.dtype, first.device)
        if func is _aten.select.int and args[1] == 0:
            return first.expert(args[2])
        decoded = tree_map(_dense, (args, kwargs or {}))
        return func(*decoded[0], **decoded[1])


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, TakenExperts) else value
