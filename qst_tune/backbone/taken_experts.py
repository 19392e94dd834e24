"""The experts of a mixture as a quantised directory stores them: a weight each, with its codes.

Notation: E experts, each with a weight ``[O, I]``.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.quantization.nf4 import dequantize_nf4
from qst_tune.quantization.parts import named_parts

_aten = torch.ops.aten


class Expert(Protocol):
    """One expert's weight, or a piece of its rows, as codes."""

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Decode it.

        Args:
            dtype (torch.dtype): of the result.

        Returns:
            torch.Tensor: as the model has it.
        """


class TakenExperts(torch.Tensor):
    """A frozen weight ``[E, O, I]`` that decodes an expert where it is used.

    As :class:`~qst_tune.backbone.experts.QuantizedExperts`, but of codes that are not ours: each
    expert has offsets and scales of its own, and may be joined of pieces (gate and up).

    Args:
        pieces (Sequence[Sequence[Expert]]): for each piece of the rows, the E experts'.
        shape (tuple[int, ...]): ``(E, O, I)``.
        dtype (torch.dtype): that it decodes to.
        device (torch.device): where the codes are.
        quantization (str): name of their format.
    """

    pieces: Sequence[Sequence[Expert]]
    quantization: str

    @staticmethod
    def __new__(
        cls,
        pieces: Sequence[Sequence[Expert]],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        quantization: str,
    ) -> "TakenExperts":
        """Make the tensor without memory of its own."""
        made: TakenExperts = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device
        )
        made.pieces, made.quantization = pieces, quantization
        return made

    def __getattr__(self, name: str) -> torch.Tensor:
        """Return one of the plain tensors that :meth:`__tensor_flatten__` names."""
        piece, _, rest = name.partition("/")
        index, _, part = rest.partition("/")
        if not part:
            raise AttributeError(name)
        return _plain(self.pieces[int(piece)][int(index)])[part]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Name the plain tensors, for whoever counts bytes."""
        return [
            f"{piece}/{index}/{part}"
            for piece, experts in enumerate(self.pieces)
            for index, expert in enumerate(experts)
            for part in _plain(expert)
        ], None

    @staticmethod
    def __tensor_unflatten__(*_: Any) -> "TakenExperts":
        """Refuse: nothing makes experts of such parts again."""
        raise NotImplementedError("experts in another program's codes are only read from its files")

    def expert(self, index: int) -> torch.Tensor:
        """Decode one expert.

        Args:
            index (int): which.

        Returns:
            torch.Tensor: ``[O, I]``.
        """
        pieces = [experts[index].dense_weight(self.dtype) for experts in self.pieces]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

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
            return cls(
                first.pieces, tuple(first.shape), first.dtype, first.device, first.quantization
            )
        if func is _aten.select.int and args[1] == 0:
            return first.expert(args[2])
        decoded = tree_map(_dense, (args, kwargs or {}))
        return func(*decoded[0], **decoded[1])


class TransposedLinear(nn.Module):
    """The weight of an expert that is stored the other way round; gpt-oss multiplies ``x W``.

    Args:
        weight (NF4Tensor): ``[O, I]``.
    """

    def __init__(self, weight: NF4Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Decode the weight.

        Args:
            dtype (torch.dtype): of the result.

        Returns:
            torch.Tensor: ``[I, O]``, a view.
        """
        return dequantize_nf4(self.weight).to(dtype).T


def _plain(expert: Any) -> dict[str, torch.Tensor]:
    own = {**dict(expert.named_parameters()), **dict(expert.named_buffers())}
    return {n: part for name, t in own.items() for n, part in named_parts(name, t).items()}


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, TakenExperts) else value
