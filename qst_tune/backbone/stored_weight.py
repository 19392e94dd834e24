"""A weight of a quantised directory on its way into a model of transformers."""

from collections.abc import Callable
from typing import Any

import torch

from qst_tune.backbone.experts import with_dense
from qst_tune.errors import UserError
from qst_tune.quantization.stored import Stored, stored_on

_aten = torch.ops.aten
# A list: the experts of a mixture, in one tensor.
Decode = Callable[[dict[str, torch.Tensor]], Stored | list[Stored]]


class StoredWeight(torch.Tensor):
    """A tensor that keeps its codes for as long as it is only moved, and decodes for all else.

    transformers' loader renames weights, and for some model types stacks, splits or fuses them. A
    weight that is only renamed arrives with its codes, and so do the experts of a mixture, stacked
    and perhaps joined along their outputs; any other one arrives dense.

    Args:
        pieces (list[list[Stored]]): one of one weight; of experts, for each piece of their outputs
            a list of the E experts' weights.
        shape (tuple[int, ...]): ``[O, I]``, or ``[E, O, I]``.
        dtype (torch.dtype): of the dense weight.
    """

    pieces: list[list[Stored]]

    @staticmethod
    def __new__(
        cls, pieces: list[list[Stored]], shape: tuple[int, ...], dtype: torch.dtype
    ) -> "StoredWeight":
        """Make the tensor without memory of its own."""
        made: StoredWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=torch.device("cpu")
        )
        made.pieces = pieces
        return made

    @property
    def is_stack(self) -> bool:
        """Whether it is ``[E, O, I]`` of experts that are stored each by itself."""
        return self.ndim > len(self.pieces[0][0].shape)

    def dense(self, device: torch.device | None = None) -> torch.Tensor:
        """Decode the weight to its dtype, on the CPU by default."""
        there = device or torch.device("cpu")
        pieces = [
            [stored_on(weight, there).dense(self.dtype) for weight in weights]
            for weights in self.pieces
        ]
        if not self.is_stack:
            return pieces[0][0]
        return torch.cat([torch.stack(experts) for experts in pieces], dim=1)

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes an argument
        kind = type(self.pieces[0][0]).__name__
        return f"StoredWeight({kind}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the disabled one
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Keep the codes where only name, dtype or the experts' tensor changes."""
        kwargs = kwargs or {}
        first = args[0]
        if func in (_aten.detach.default, _aten.alias.default):
            return cls(first.pieces, tuple(first.shape), first.dtype)
        if func is _aten._to_copy.default and _stays(kwargs.get("device")):
            return cls(first.pieces, tuple(first.shape), kwargs.get("dtype") or first.dtype)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if func is _aten.stack.default and dim == 0 and _are(first, is_stack=False):
            weights = [weight.pieces[0][0] for weight in first]
            return cls([weights], (len(first), *first[0].shape), first[0].dtype)
        if func is _aten.cat.default and dim == 1 and _are(first, is_stack=True):
            shape = list(first[0].shape)
            shape[1] = sum(stack.shape[1] for stack in first)
            return cls([p for stack in first for p in stack.pieces], tuple(shape), first[0].dtype)
        return with_dense(cls, func, args, kwargs)


def _stays(device: Any) -> bool:
    return device is None or torch.device(device).type == "cpu"


def _are(weights: Any, *, is_stack: bool) -> bool:
    return all(isinstance(w, StoredWeight) and w.is_stack == is_stack for w in weights)


class LazyWeight:
    """One weight for transformers' loader: its tensors are read and put together on demand."""

    def __init__(
        self,
        name: str,
        parts: dict[str, torch.Tensor],
        decode: Decode,
        dtype: torch.dtype,
    ) -> None:
        self._name, self._parts, self._decode, self.dtype = name, parts, decode, dtype

    def __getitem__(self, index: Any) -> StoredWeight:
        """Read the whole weight, not decoded, whatever the index: the loader asks for ``[...]``.

        UserError if a tensor is missing or they do not belong together.
        """
        try:
            stored = self._decode(self._parts)
        except KeyError as error:
            raise UserError(f"{self._name} is damaged: its tensor {error} is missing") from error
        except (ValueError, RuntimeError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self._name} cannot be read: {reason}") from error
        if isinstance(stored, list):
            return StoredWeight([stored], (len(stored), *stored[0].shape), self.dtype)
        return StoredWeight([[stored]], stored.shape, self.dtype)
