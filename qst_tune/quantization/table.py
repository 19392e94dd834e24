"""A frozen, quantised weight with a row for each token: of an embedding, an LM head, or both.

Notation: V rows, D columns.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import return_and_correct_aliasing

from qst_tune.quantization.affine import row_parts

# Weights decoded at once: small enough for a CPU's caches (measured: no slower than the dense
# product by more than a fifth), and on a GPU large enough that few kernels are started.
WEIGHTS_AT_ONCE = {"cpu": 2**22, "cuda": 2**24}
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny

_aten = torch.ops.aten


class QuantizedTable(torch.Tensor):
    r"""A ``[V, D]`` weight as int8 codes with a scale a row, for an embedding and a linear layer.

    .. math:: W_{vd} = s_v\, q_{vd}, \qquad -127 \le q \le 127

    ``codes`` are int8 ``[V, D]``, ``row_scale`` fp32 ``[V, 1]``, and ``dtype`` that of decoded
    rows: 1 + 4 / D bytes a weight. ``F.embedding`` decodes the rows of its tokens. ``F.linear(x,
    W)``, its gradient and ``x @ W`` decode some rows at a time; a row's scale is applied to the
    product. ``copy_`` from a dense weight quantises. Everything else raises: decode with
    :meth:`dense`. Only x gets a gradient.
    """

    codes: torch.Tensor
    row_scale: torch.Tensor

    @staticmethod
    def __new__(
        cls, codes: torch.Tensor, row_scale: torch.Tensor, dtype: torch.dtype
    ) -> "QuantizedTable":
        """Make the tensor without memory of its own."""
        table: QuantizedTable = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=dtype, device=codes.device, requires_grad=False
        )
        table.codes, table.row_scale = codes, row_scale
        return table

    # What an embedding and a linear layer ask for.

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Decode the rows of tokens: ``[..., D]``, rounded once to the table's dtype."""
        return self._scaled(self.codes[tokens], self.row_scale[tokens], self.dtype)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply with all rows, ``x W^T``: ``[..., D]`` to ``[..., V]`` in the dtype of ``x``."""
        y = x.new_empty(*x.shape[:-1], len(self))
        for rows in self._parts():
            y[..., rows] = self._scores_of(rows, x)
        return y

    def mixture(self, shares: torch.Tensor) -> torch.Tensor:
        """Sum rows: ``p W``, ``[..., V]`` to ``[..., D]``, summed in fp32 or better."""
        total = _wide(shares.new_zeros(*shares.shape[:-1], self.shape[1]))
        for rows in self._parts():
            total += self._mixture_of(rows, shares[..., rows])
        return total.to(shares.dtype)

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decode all of it; the default dtype is its own."""
        dtype = dtype or self.dtype
        weight = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for rows in self._parts():
            weight[rows] = self._scaled(self.codes[rows], self.row_scale[rows], dtype)
        return weight

    # Functions of their own, so that one part's dense weight is gone before the next one's is made.

    def _scores_of(self, rows: slice, x: torch.Tensor) -> torch.Tensor:
        weight, scale = self._factors(rows, x.dtype)
        product = F.linear(x, weight)
        return product if scale is None else _wide(product) * scale

    def _mixture_of(self, rows: slice, shares: torch.Tensor) -> torch.Tensor:
        weight, scale = self._factors(rows, shares.dtype)
        if scale is not None:
            shares = (_wide(shares) * scale).to(shares.dtype)
        return shares @ weight

    def _parts(self) -> Iterator[slice]:
        at_once = WEIGHTS_AT_ONCE.get(self.device.type, WEIGHTS_AT_ONCE["cuda"])
        return row_parts(len(self), self.shape[1], weights_at_once=at_once)

    def _factors(self, rows: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A weight ``[R, D]`` and the remaining factor of each of its rows, ``[R]``."""
        codes, scale = self.codes[rows], self.row_scale[rows]
        # In fp16 a product with codes, before its scale, can exceed 65504, and a share of a
        # probability times a scale vanishes below 6e-8: the weight is decoded first.
        if dtype != torch.float16:
            return codes.to(dtype), scale.squeeze(1)
        return self._scaled(codes, scale, dtype), None

    @staticmethod
    def _scaled(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (codes * scale).to(dtype)

    # What torch asks of a tensor that is made of others.

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """Return the names of the plain tensors, and the rest of what makes a table."""
        return ["codes", "row_scale"], {"dtype": self.dtype}

    @classmethod
    def __tensor_unflatten__(
        cls, parts: dict[str, torch.Tensor], context: dict[str, Any], *_: Any
    ) -> "QuantizedTable":
        """Make a table of what :meth:`__tensor_flatten__` returned."""
        return cls(parts["codes"], parts["row_scale"], **context)

    def __repr__(self) -> str:  # type: ignore[override]  # torch's own argument is for its own use
        """Describe it without its values, which would have to be decoded."""
        return f"QuantizedTable({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute what :data:`_FUNCTIONS` names, above autograd, and leave the rest to torch."""
        if func in _FUNCTIONS:
            return _FUNCTIONS[func](*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch gives the types as a sequence
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Make, move and fill tables; anything else would need the dense weight."""
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default, _aten.clone.default):
            old = args[0]
            table = cls(func(old.codes), func(old.row_scale), old.dtype)
            return return_and_correct_aliasing(func, args, kwargs, table)
        if func is _aten._to_copy.default:
            return args[0]._moved(kwargs.get("device"), kwargs.get("dtype"))
        if func is _aten.copy_.default and isinstance(args[0], cls):
            return args[0]._fill(args[1])
        raise NotImplementedError(
            f"{func} is not defined for a {cls.__name__}: decode it with dense() first"
        )

    def _moved(self, device: torch.device | None, dtype: torch.dtype | None) -> "QuantizedTable":
        codes, scale = (part.to(device=device, copy=True) for part in (self.codes, self.row_scale))
        return QuantizedTable(codes, scale, dtype or self.dtype)

    def _fill(self, weight: torch.Tensor) -> "QuantizedTable":
        if not isinstance(weight, QuantizedTable):
            weight = quantize_table(weight, dtype=self.dtype, device=self.codes.device)
        self.codes.copy_(weight.codes)
        self.row_scale.copy_(weight.row_scale)
        return self


def quantize_table(
    weight: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> QuantizedTable:
    r"""Quantise ``[V, D]``, such as a view of a file, some rows at a time; ``weight`` may be meta.

    It is symmetric rounding to nearest from fp32, :math:`s = \max_d |w_d| / 127` and
    :math:`q = \mathrm{round}(w / s)`.
    """
    num_rows, dim = weight.shape
    dtype, device = dtype or weight.dtype, device or weight.device
    codes = torch.empty(num_rows, dim, dtype=torch.int8, device=device)
    scale = torch.empty(num_rows, 1, dtype=torch.float32, device=device)
    for rows in () if weight.is_meta else row_parts(num_rows, dim):
        part = weight[rows].detach().to(device=device, dtype=torch.float32)
        scale[rows] = (part.abs().amax(-1, keepdim=True) / 127).clamp(min=_SMALLEST_SCALE)
        codes[rows] = (part / scale[rows]).round_().clamp_(-127, 127).to(torch.int8)
    return QuantizedTable(codes, scale, dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In fp32, or fp64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Linear(torch.autograd.Function):
    """``x W^T``; backward needs only the table, a constant."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, table: QuantizedTable) -> torch.Tensor:
        ctx.table = table
        return table.scores(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.table.mixture(grad), None


def _linear(
    x: torch.Tensor, weight: QuantizedTable, bias: torch.Tensor | None = None
) -> torch.Tensor:
    y: torch.Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


def _embedding(
    tokens: torch.Tensor,
    weight: QuantizedTable,
    padding_idx: int | None = None,  # only chooses a row that has no gradient; none has
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    if max_norm is not None:
        raise NotImplementedError("max_norm changes rows in place, and these are quantised")
    return weight.rows(tokens)


def _matmul(shares: torch.Tensor, table: QuantizedTable) -> torch.Tensor:
    return table.mixture(shares)


_FUNCTIONS: dict[Any, Callable[..., torch.Tensor]] = {
    F.embedding: _embedding,
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
}
