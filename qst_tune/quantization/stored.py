"""Weights as a directory of another program stores them: codes that can be taken over as they are.

Notation: O output channels, I input channels, G groups a row, g input channels a group.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.quantization.affine import AffineLayout, AffineWeight, dequantize_affine
from qst_tune.quantization.nf4 import QuantType, dequantize_nf4, nf4_from_parts
from qst_tune.quantization.packing import pack

StoredT = TypeVar("StoredT", bound="Stored")


@dataclass(frozen=True)
class StoredNF4:
    """A weight of 16 levels, in the parts of our own NF4 and FP4 weights.

    Args:
        shape (tuple[int, ...]): of the weight.
        quant_type (QuantType): "nf4" or "fp4"; of MXFP4 only ``levels`` says what it is.
        codes (torch.Tensor): ``[numel / 2]`` uint8, two codes a byte.
        scalers (torch.Tensor): ``[blocks]``: fp32, or uint8 codes of an 8-bit map.
        factors (torch.Tensor): fp32, for groups of scaler codes.
        offset_and_map (torch.Tensor): ``[257]`` fp32: what is added to each scaler, then the 256
            numbers that scaler codes encode.
        levels (torch.Tensor): ``[16]`` fp32.
    """

    shape: tuple[int, ...]
    quant_type: QuantType
    codes: torch.Tensor
    scalers: torch.Tensor
    factors: torch.Tensor
    offset_and_map: torch.Tensor
    levels: torch.Tensor

    def nf4(self, dtype: torch.dtype) -> NF4Tensor:
        """Make the weight; codes and scalers stay what they are.

        Args:
            dtype (torch.dtype): that the weight decodes to.

        Returns:
            NF4Tensor: of the same shape.
        """
        parts = [self.scalers, self.factors, self.offset_and_map, self.codes, self.levels.to(dtype)]
        return nf4_from_parts(self.shape, parts)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Decode the weight, from fp32.

        Args:
            dtype (torch.dtype): of the result.

        Returns:
            torch.Tensor: of ``shape``.
        """
        return dequantize_nf4(self.nf4(torch.float32)).to(dtype)


@dataclass(frozen=True)
class StoredAffine:
    """A weight of integer codes, with the exact scales and zero points of the directory.

    Args:
        weight (AffineWeight): codes ``[O, G g]``, its columns in ``order``.
        layout (AffineLayout): of its rows.
        order (torch.Tensor | None): ``[I]`` int64, the input channel of each column, where the
            groups do not follow each other (act-order); None: they do.
    """

    weight: AffineWeight
    layout: AffineLayout
    order: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``(O, I)``."""
        return (len(self.weight.codes), self.layout.in_dim)

    def packed(self) -> torch.Tensor:
        """Pack the codes.

        Returns:
            torch.Tensor: ``[O, layout.num_bytes]`` uint8.
        """
        return pack(self.weight.codes, self.layout.bits)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Decode the weight, in fp32, with the input channels in their own order.

        Args:
            dtype (torch.dtype): of the result.

        Returns:
            torch.Tensor: ``[O, I]``.
        """
        _, scale, zero_point = self.weight
        dense = dequantize_affine(self.packed(), scale, zero_point, self.layout, dtype)
        return dense if self.order is None else in_own_order(dense, self.order)


@dataclass(frozen=True)
class StoredFloat:
    """A weight in a floating-point format that is none of ours (FP8, MXFP4), decoded.

    Args:
        values (torch.Tensor): the numbers, in a dtype that holds them exactly.
    """

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.values.shape)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers.

        Args:
            dtype (torch.dtype): of the result.

        Returns:
            torch.Tensor: of ``shape``.
        """
        return self.values.to(dtype)


@dataclass(frozen=True)
class StoredTransposed:
    """A weight that the model has the other way round.

    Args:
        weight (StoredNF4): ``[O, I]``.
    """

    weight: StoredNF4

    @property
    def shape(self) -> tuple[int, ...]:
        """``(I, O)``."""
        return self.weight.shape[::-1]

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Decode the weight.

        Args:
            dtype (torch.dtype): of the result.

        Returns:
            torch.Tensor: ``[I, O]``.
        """
        return self.weight.dense(dtype).T


Stored = StoredNF4 | StoredAffine | StoredFloat | StoredTransposed


def in_own_order(columns: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Undo a permutation of columns.

    Args:
        columns (torch.Tensor): ``[..., I]``, column j is that of input channel ``order[j]``.
        order (torch.Tensor): ``[I]``.

    Returns:
        torch.Tensor: ``[..., I]``, column i is that of input channel i.
    """
    return columns.index_select(-1, torch.argsort(order))


def stored_on(stored: StoredT, device: torch.device) -> StoredT:
    """Move a stored weight.

    Args:
        stored (StoredT): on any device.
        device (torch.device): where to.

    Returns:
        StoredT: there.
    """
    moved = {field.name: _moved(getattr(stored, field.name), device) for field in fields(stored)}
    return replace(stored, **moved)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, AffineWeight):
        return AffineWeight(*(part.to(device) for part in value))
    if isinstance(value, StoredNF4):
        return stored_on(value, device)
    return value
