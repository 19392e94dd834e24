"""Weights as another program's directory stores them: their codes are used as they are.

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
    """A weight of 16 levels, in the parts of our own NF4 and FP4 weights."""

    shape: tuple[int, ...]
    quant_type: QuantType  # MXFP4 is "fp4" with other levels
    codes: torch.Tensor  # [numel / 2] uint8, two codes a byte
    scalers: torch.Tensor  # [blocks]: fp32, or uint8 codes of an 8-bit map
    factors: torch.Tensor  # fp32, for groups of scaler codes
    # [257] fp32: added to each scaler, then the 256 numbers that scaler codes encode
    offset_and_map: torch.Tensor
    levels: torch.Tensor  # [16] fp32

    def nf4(self, dtype: torch.dtype) -> NF4Tensor:
        """Make the weight, which decodes to ``dtype``; codes and scalers stay what they are."""
        parts = [self.scalers, self.factors, self.offset_and_map, self.codes, self.levels.to(dtype)]
        return nf4_from_parts(self.shape, parts)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Decode the weight, from fp32."""
        return dequantize_nf4(self.nf4(torch.float32)).to(dtype)


@dataclass(frozen=True)
class StoredAffine:
    """A weight of integer codes, with the exact scales and zero points of the directory."""

    weight: AffineWeight  # codes [O, G g], its columns in order
    layout: AffineLayout
    # [I] int64, the input channel of each column; None: groups follow each other (no act-order)
    order: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``(O, I)``."""
        return (len(self.weight.codes), self.layout.in_dim)

    def packed(self) -> torch.Tensor:
        """Pack the codes to ``[O, layout.num_bytes]`` uint8."""
        return pack(self.weight.codes, self.layout.bits)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Decode the weight, in fp32, with the input channels in their own order."""
        _, scale, zero_point = self.weight
        dense = dequantize_affine(self.packed(), scale, zero_point, self.layout, dtype)
        return dense if self.order is None else in_own_order(dense, self.order)


@dataclass(frozen=True)
class StoredFloat:
    """A decoded weight of another floating-point format (FP8, MXFP4), in a dtype that is exact."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.values.shape)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight."""
        return self.values.to(dtype)


@dataclass(frozen=True)
class StoredTransposed:
    """A weight ``[O, I]`` whose transpose is in the model."""

    weight: StoredNF4

    @property
    def shape(self) -> tuple[int, ...]:
        """``(I, O)``."""
        return self.weight.shape[::-1]

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Decode the weight, ``[I, O]``."""
        return self.weight.dense(dtype).T


Stored = StoredNF4 | StoredAffine | StoredFloat | StoredTransposed


def in_own_order(columns: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Undo a permutation: column j of ``[..., I]`` is that of input channel ``order[j]``."""
    return columns.index_select(-1, torch.argsort(order))


def stored_on(stored: StoredT, device: torch.device) -> StoredT:
    """Move a stored weight to a device."""
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
