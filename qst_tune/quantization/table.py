"""A frozen, quantised weight with a row for each token: of an embedding, an LM head, or both.

Notation: V rows, D columns, G groups a row, C bytes a row.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import return_and_correct_aliasing

from qst_tune.quantization.affine import row_parts
from qst_tune.quantization.nf4 import BLOCK_SIZE, decode_levels, nearest_levels

TableFormat = Literal["int8", "nf4"]

# Weights decoded at once: small enough for a CPU's caches (measured: no slower than the dense
# product by more than a fifth), and on a GPU large enough that few kernels are started.
WEIGHTS_AT_ONCE = {"cpu": 2**22, "cuda": 2**24}
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny

_aten = torch.ops.aten


class _Format(NamedTuple):
    """One way to store rows."""

    # from rows [R, G, D / G] to codes [R, C] and scales [R, G]
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    # from codes [..., C] to their levels [..., D] in a dtype
    decode: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    codes_dtype: torch.dtype
    codes_per_byte: int
    scale_dtype: torch.dtype | None  # rows are rounded in it; None: the table's
    block_size: int | None  # columns that share a scale; None: all

    def num_groups(self, dim: int) -> int:
        """G of rows of D columns; a block never spans two rows."""
        return 1 if self.block_size is None else dim // math.gcd(dim, self.block_size)


def _quantize_int8(rows_RGd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (rows_RGd.abs().amax(-1, keepdim=True) / 127).clamp(min=_SMALLEST_SCALE)
    codes = (rows_RGd / scale).round_().clamp_(-127, 127).to(torch.int8)
    return codes.flatten(1), scale.squeeze(-1)


def _quantize_nf4(rows_RGd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, _, block = rows_RGd.shape
    codes = nearest_levels(rows_RGd.contiguous(), block).view(num_rows, -1)
    return codes, rows_RGd.abs().amax(-1)


_FORMATS: dict[TableFormat, _Format] = {
    "int8": _Format(_quantize_int8, torch.Tensor.to, torch.int8, 1, torch.float32, None),
    "nf4": _Format(_quantize_nf4, decode_levels, torch.uint8, 2, None, BLOCK_SIZE),
}


class QuantizedTable(torch.Tensor):
    r"""A ``[V, D]`` weight stored as codes and scales, for an embedding and a linear layer.

    .. math:: W_{vd} = s_{v, g(d)}\, L[q_{vd}]

    ========  ==================================  ===========================  ==================
    format    :math:`L[q]`                        scales                       bytes a weight
    ========  ==================================  ===========================  ==================
    "int8"    q, from -127 to 127                 fp32, one a row: G = 1       1 + 4 / D
    "nf4"     the 16 levels of QLoRA's NF4        absmax of 64 columns, in     0.53 in bf16
                                                  the weight's own dtype
    ========  ==================================  ===========================  ==================

    It replaces a module's dense weight. ``F.embedding`` decodes the rows of its tokens.
    ``F.linear(x, W)``, its gradient and ``x @ W`` decode some rows at a time and never have the
    dense weight; the scale of a whole row is applied to the product. ``copy_`` from a dense weight
    quantises. Everything else raises: decode with :meth:`dense` first. The table is frozen: only x
    gets a gradient.

    NF4's scales are not quantised again (QLoRA's double quantisation): so a row is decoded from its
    own bytes alone, and a scale is exact, being one of the weights. That costs 3 % more bytes.

    Args:
        codes (torch.Tensor): ``[V, C]``, int8 (C = D) or uint8 (C = D / 2).
        row_scale (torch.Tensor): ``[V, G]``.
        form (TableFormat): "int8" or "nf4".
        dtype (torch.dtype): of the tensor and of its decoded rows.
    """

    codes: torch.Tensor
    row_scale: torch.Tensor
    form: TableFormat

    @staticmethod
    def __new__(
        cls,
        codes: torch.Tensor,
        row_scale: torch.Tensor,
        form: TableFormat,
        dtype: torch.dtype,
    ) -> "QuantizedTable":
        """Make the tensor without memory of its own."""
        shape = (len(codes), codes.shape[1] * _FORMATS[form].codes_per_byte)
        table: QuantizedTable = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=codes.device, requires_grad=False
        )
        table.codes, table.row_scale, table.form = codes, row_scale, form
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
        if scale.shape[1] == 1 and dtype != torch.float16:
            return _FORMATS[self.form].decode(codes, self.dtype).to(dtype), scale.squeeze(1)
        return self._scaled(codes, scale, dtype), None

    def _scaled(self, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        levels = _FORMATS[self.form].decode(codes, self.dtype)  # exact in int8, torchao's in NF4
        groups = levels.unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)
        scaled: torch.Tensor = groups.flatten(-2).to(dtype)
        return scaled

    # What torch asks of a tensor that is made of others.

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """Return the names of the plain tensors, and the rest of what makes a table."""
        return ["codes", "row_scale"], {"form": self.form, "dtype": self.dtype}

    @classmethod
    def __tensor_unflatten__(
        cls, parts: dict[str, torch.Tensor], context: dict[str, Any], *_: Any
    ) -> "QuantizedTable":
        """Make a table of what :meth:`__tensor_flatten__` returned."""
        return cls(parts["codes"], parts["row_scale"], **context)

    def __repr__(self) -> str:  # type: ignore[override]  # torch's own argument is for its own use
        """Describe it without its values, which would have to be decoded."""
        return f"QuantizedTable({self.form}, {tuple(self.shape)}, {self.dtype}, {self.device})"

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
            table = cls(func(old.codes), func(old.row_scale), old.form, old.dtype)
            return return_and_correct_aliasing(func, args, kwargs, table)
        if func is _aten._to_copy.default:
            return args[0]._moved(kwargs.get("device"), kwargs.get("dtype"))
        if func is _aten.copy_.default and isinstance(args[0], cls):
            return args[0]._fill(args[1])
        raise NotImplementedError(
            f"{func} is not defined for a {cls.__name__}: decode it with dense() first"
        )

    def _moved(self, device: torch.device | None, dtype: torch.dtype | None) -> "QuantizedTable":
        dtype = dtype or self.dtype
        scale_dtype = _FORMATS[self.form].scale_dtype or dtype
        scale = self.row_scale.to(device=device, dtype=scale_dtype, copy=True)
        return QuantizedTable(self.codes.to(device=device, copy=True), scale, self.form, dtype)

    def _fill(self, weight: torch.Tensor) -> "QuantizedTable":
        if not isinstance(weight, QuantizedTable):
            weight = quantize_table(weight, self.form, dtype=self.dtype, device=self.codes.device)
        self.codes.copy_(weight.codes)
        self.row_scale.copy_(weight.row_scale)
        return self


def quantize_table(
    weight: torch.Tensor,
    form: TableFormat,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> QuantizedTable:
    r"""Quantise a dense weight, some rows at a time: no second copy of the whole exists.

    int8 is symmetric rounding to nearest from fp32, :math:`s = \max_d |w_d| / 127` and
    :math:`q = \mathrm{round}(w / s)`; NF4 takes the nearest level of ``w / absmax`` in ``dtype``,
    as torchao does. NF4 with an odd D is a ValueError.

    Args:
        weight (torch.Tensor): ``[V, D]``, floating point, such as a view of a file; may be meta.
        form (TableFormat): "int8" or "nf4".
        dtype (torch.dtype | None): of the table; None: that of ``weight``.
        device (torch.device | None): of the table; None: that of ``weight``.

    Returns:
        QuantizedTable: ``[V, D]``.
    """
    num_rows, dim = weight.shape
    layout = _FORMATS[form]
    if dim % layout.codes_per_byte:
        raise ValueError(
            f"rows of {dim} weights cannot be stored in 4 bits, two codes in a byte: use "
            "embedding_quantization=int8"
        )
    dtype, device = dtype or weight.dtype, device or weight.device
    scale_dtype, num_groups = layout.scale_dtype or dtype, layout.num_groups(dim)
    num_bytes = dim // layout.codes_per_byte
    codes = torch.empty(num_rows, num_bytes, dtype=layout.codes_dtype, device=device)
    scale = torch.empty(num_rows, num_groups, dtype=scale_dtype, device=device)
    for rows in () if weight.is_meta else row_parts(num_rows, dim):
        part = weight[rows].detach().to(device=device, dtype=scale_dtype)
        codes[rows], scale[rows] = layout.quantize(part.unflatten(1, (num_groups, -1)))
    return QuantizedTable(codes, scale, form, dtype)


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
