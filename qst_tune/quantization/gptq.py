"""Integer weights in the layout of GPTQ checkpoints, which transformers and vLLM read.

A linear of O outputs and I inputs, with G groups of its input channels:

===========  =====================  ============================================================
``qweight``  int32 [I b / 32, O]    codes, packed along the input channels
``qzeros``   int32 [G, O b / 32]    zero points, packed along the output channels
``scales``   fp16 [G, O]            scales
``g_idx``    int32 [I]              group of each input channel
===========  =====================  ============================================================

Packed numbers follow each other in the bits of the words, the first in the lowest; a 3-bit number
may span two words. "gptq" stores each zero point less one, as the first programs did, and so cannot
store 0; "gptq_v2" stores it as it is.

Source: the packing of AutoGPTQ and GPTQModel (github.com/ModelCloud/GPTQModel).
"""

from collections.abc import Mapping
from typing import Literal

import torch

from qst_tune.quantization.affine import AffineLayout, AffineWeight
from qst_tune.quantization.packing import pack_groups, units_together, unpack_groups
from qst_tune.quantization.stored import StoredAffine, in_own_order

GPTQFormat = Literal["gptq", "gptq_v2"]
_WORD_BITS = 32


def to_gptq(
    weight: AffineWeight,
    *,
    bits: int,
    group_size: int,
    form: GPTQFormat,
    order: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Store a weight as GPTQ checkpoints do: the four tensors by name.

    ``weight`` has codes ``[O, I]`` without padding; ``order`` is what :func:`from_gptq` gave it.
    ValueError if sizes are no multiples of a word, or "gptq" would have to store zero point 0.
    """
    codes, scale, zero_point = weight
    out_dim, in_dim = codes.shape
    together, _ = units_together(bits, _WORD_BITS)
    if not fits_gptq(out_dim, in_dim, bits=bits, group_size=group_size):
        raise ValueError(
            f"a weight of {out_dim} x {in_dim} does not fit the GPTQ format at {bits} bits and "
            f"group_size={group_size}: sizes must be multiples of {together}, and whole groups"
        )
    if form == "gptq" and not zero_point.all():
        raise ValueError(
            "a group has zero point 0, which the format gptq cannot store: use gptq_v2"
        )
    stored = zero_point.int() - (1 if form == "gptq" else 0)
    g_idx = (torch.arange(in_dim, device=codes.device) // group_size).int()
    if order is not None:
        codes, g_idx = in_own_order(codes, order), in_own_order(g_idx, order)
    return {
        "qweight": pack_words(codes.T.int(), bits),
        "qzeros": pack_words(stored, bits).T.contiguous(),
        "scales": scale.T.to(torch.float16).contiguous(),
        "g_idx": g_idx,
    }


def fits_gptq(out_dim: int, in_dim: int, *, bits: int, group_size: int) -> bool:
    """Whether a weight fills whole words and groups, which :func:`to_gptq` needs."""
    together, _ = units_together(bits, _WORD_BITS)
    return not (in_dim % group_size or in_dim % together or out_dim % together)


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack numbers below ``2^bits`` along the first dimension: ``[N, M]`` to int32 ``[W, M]``."""
    num_values, _ = units_together(bits, _WORD_BITS)
    words = pack_groups(values.long().view(-1, num_values, values.shape[1]), bits, _WORD_BITS)
    # Only the low 32 bits of each; as signed, which is how the format has them.
    return words.view(-1, values.shape[1]).to(torch.int32)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo :func:`pack_words`: int32 ``[W, M]`` to uint8 ``[32 W / bits, M]``."""
    _, num_words = units_together(bits, _WORD_BITS)
    unsigned = words.long() & (2**_WORD_BITS - 1)
    groups = unsigned.view(-1, num_words, words.shape[1])
    return unpack_groups(groups, bits, _WORD_BITS).view(-1, words.shape[1])


def from_gptq(
    parts: Mapping[str, torch.Tensor],
    *,
    bits: int,
    form: GPTQFormat,
    group_size: int | None = None,
) -> StoredAffine:
    """Read a linear of a GPTQ checkpoint, including act-order; ``g_idx`` may be missing.

    ``group_size`` matters where the last group is not full; None: all groups are full. ValueError
    if the tensors do not belong together, or groups differ in size.
    """
    zeros_GO = unpack_words(parts["qzeros"].T.contiguous(), bits).T
    if form == "gptq":
        zeros_GO = (zeros_GO + 1) & (2**bits - 1)
    return stored_affine(
        unpack_words(parts["qweight"], bits).T,
        parts["scales"].T,
        zeros_GO.T,
        bits=bits,
        group_size=group_size,
        g_idx=parts.get("g_idx"),
    )


def _group_size(in_dim: int, num_groups: int, group_size: int | None = None) -> int:
    """Return g: the whole model's ``group_size`` if it fits a weight, else that of equal groups."""
    if group_size and -(-in_dim // group_size) == num_groups:
        return min(group_size, in_dim)
    return -(-in_dim // num_groups)


def _group_order(g_idx: torch.Tensor | None, in_dim: int, group_size: int) -> torch.Tensor | None:
    """Return the input channels ``[I]``, group after group; None if they are in order already."""
    regular = torch.arange(in_dim) // group_size
    if g_idx is None or torch.equal(g_idx.long(), regular):
        return None
    order = torch.argsort(g_idx.long(), stable=True)
    if len(g_idx) != in_dim or not torch.equal(g_idx.long()[order], regular):
        raise ValueError(
            f"g_idx puts the input channels in groups that are not of {group_size}, which is not "
            "supported"
        )
    return order


def stored_affine(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    g_idx: torch.Tensor | None = None,
) -> StoredAffine:
    """Make a contiguous weight, its columns group after group and its last group padded.

    ``codes`` are ``[O, I]`` uint8, ``scale`` ``[O, G]``, ``zero_point`` ``[O, G]`` uint8, and
    ``g_idx`` ``[I]`` the group of each input channel (None: in order). ValueError as of
    :func:`from_gptq`.
    """
    out_dim, in_dim = codes.shape
    if scale.shape != zero_point.shape or len(scale) != out_dim:
        raise ValueError(
            f"scales {tuple(scale.shape)} and zero points {tuple(zero_point.shape)} are not those "
            f"of {out_dim} x {in_dim} codes"
        )
    layout = AffineLayout(bits, _group_size(in_dim, scale.shape[1], group_size), in_dim)
    order = _group_order(g_idx, in_dim, layout.group_size)
    if order is not None:
        codes = codes[:, order]
    missing = layout.num_codes - in_dim
    if missing:
        codes = torch.cat([codes, zero_point[:, -1:].expand(-1, missing)], dim=1)
    parts = (codes.contiguous(), scale.float().contiguous(), zero_point.contiguous())
    return StoredAffine(AffineWeight(*parts), layout, order)
