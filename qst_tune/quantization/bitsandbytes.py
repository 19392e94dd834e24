"""Read the weights that bitsandbytes stores, in 4 and in 8 bits.

A 4-bit linear; its scalers (absmax) may be quantised again ("nested"):

===========================================  ==================================================
``weight``                                   uint8 ``[O I / 2, 1]``, two codes a byte, the first
                                             in the high half, as in torchao
``weight.absmax``                            fp32, one a block of 64, or uint8 codes of them
``weight.quant_map``                         the 16 levels, fp32
``weight.nested_absmax``                     fp32, one for 256 codes of absmax
``weight.nested_quant_map``                  the 256 numbers that these codes encode, fp32
``weight.quant_state.bitsandbytes__nf4``     JSON as bytes: shape, block sizes, offset of absmax
===========================================  ==================================================

An 8-bit linear has int8 ``weight`` ``[O, I]`` and ``SCB`` ``[O]``, the largest absolute value of a
row: its weight is ``weight * SCB / 127``.

Source: ``QuantState`` and ``dequantize_4bit`` of github.com/bitsandbytes-foundation/bitsandbytes.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from qst_tune.quantization.affine import AffineLayout, AffineWeight
from qst_tune.quantization.nf4 import QuantType, nf4_block_sizes
from qst_tune.quantization.stored import StoredAffine, StoredNF4

_STATE = "weight.quant_state.bitsandbytes__"
_INT8_ZERO = 128


def read_bnb_4bit(parts: Mapping[str, torch.Tensor]) -> StoredNF4:
    """Read a 4-bit weight; parts that do not belong together are a ValueError."""
    state, quant_type = _state(parts)
    shape = tuple(int(size) for size in state["shape"])
    numel = math.prod(shape)
    codes = parts["weight"].reshape(-1)
    if codes.dtype != torch.uint8 or codes.numel() * 2 != numel:
        raise ValueError(f"{codes.numel()} bytes of {codes.dtype} are no 4-bit codes of {shape}")
    stored_block = int(state["blocksize"])
    absmax = parts["weight.absmax"].reshape(-1)
    if len(absmax) != math.ceil(numel / stored_block):
        raise ValueError(f"{len(absmax)} absmax values are not those of {shape}")
    block, group = nf4_block_sizes(numel)
    # A smaller block of ours, where 64 does not divide the weight, has the absmax of its own.
    scalers = _spread(absmax, stored_block, block, numel // block)
    factors = offset_and_map = scalers.new_zeros(0, dtype=torch.float32)
    if "weight.nested_absmax" in parts:
        stored_group = int(state["nested_blocksize"]) * stored_block
        factors = _spread(
            parts["weight.nested_absmax"], stored_group, block * group, len(scalers) // group
        )
        offset = torch.tensor([state["nested_offset"]], dtype=torch.float32)
        offset_and_map = torch.cat([offset, parts["weight.nested_quant_map"].float()])
    else:
        scalers = scalers.float()
    levels = parts["weight.quant_map"].float()
    return StoredNF4(shape, quant_type, codes, scalers, factors, offset_and_map, levels)


def _state(parts: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], QuantType]:
    for quant_type in ("nf4", "fp4"):
        packed = parts.get(_STATE + quant_type)
        if packed is not None:
            state: dict[str, Any] = json.loads(bytes(packed.tolist()).decode())
            return state, quant_type
    raise ValueError("no quant_state of nf4 or fp4")


def _spread(values: torch.Tensor, from_size: int, to_size: int, count: int) -> torch.Tensor:
    """Give each of ``count`` smaller blocks the value of the larger block that contains it."""
    index = torch.arange(count, device=values.device) * to_size // from_size
    return values.reshape(-1)[index]


def read_bnb_8bit(parts: Mapping[str, torch.Tensor]) -> StoredAffine:
    """Read an 8-bit weight from "weight" and "SCB"."""
    weight, largest = parts["weight"], parts["SCB"].float().reshape(-1, 1)
    return from_signed(weight, largest / 127)


def from_signed(weight: torch.Tensor, scale: torch.Tensor) -> StoredAffine:
    """Make an 8-bit weight with zero point 128 of int8 ``[O, I]`` and scales ``[O, G]``."""
    codes = (weight.short() + _INT8_ZERO).to(torch.uint8)
    zero_point = torch.full(scale.shape, _INT8_ZERO, dtype=torch.uint8, device=weight.device)
    layout = AffineLayout(8, weight.shape[1] // scale.shape[1], weight.shape[1])
    return StoredAffine(AffineWeight(codes, scale.float(), zero_point), layout)
