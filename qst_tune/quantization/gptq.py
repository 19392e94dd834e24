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

import math
from collections.abc import Mapping
from typing import Literal

import torch

from qst_tune.quantization.affine import AffineLayout, AffineWeight
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
    """Lay a weight out as GPTQ checkpoints do.

    Args:
        weight (AffineWeight): ``codes`` ``[O, I]`` without padding.
        bits (int): of a code.
        group_size (int): input channels that share a scale.
        form (GPTQFormat): how zero points are stored.
        order (torch.Tensor | None): ``[I]``, the input channel of each column of the codes, as
            :func:`from_gptq` gives it; None: their own.

    Returns:
        dict[str, torch.Tensor]: the four tensors by name.

    Raises:
        ValueError: if the format cannot hold this weight.
    """
    codes, scale, zero_point = weight
    out_dim, in_dim = codes.shape
    together = math.lcm(bits, _WORD_BITS) // bits
    if in_dim % group_size or in_dim % together or out_dim % together:
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


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack numbers along the first dimension into 32-bit words.

    Args:
        values (torch.Tensor): ``[N, M]``, whole numbers below ``2^bits``.
        bits (int): of a number.

    Returns:
        torch.Tensor: ``[N bits / 32, M]`` int32.
    """
    num_words = math.lcm(bits, _WORD_BITS) // _WORD_BITS
    together = num_words * _WORD_BITS // bits
    groups = values.long().view(-1, together, values.shape[1])
    words = groups.new_zeros(len(groups), num_words, values.shape[1])
    for index in range(together):
        word, shift = divmod(index * bits, _WORD_BITS)
        words[:, word] |= groups[:, index] << shift
        if shift + bits > _WORD_BITS:
            words[:, word + 1] |= groups[:, index] >> (_WORD_BITS - shift)
    # Only the low 32 bits of each; as signed, which is how the format has them.
    return words.view(-1, values.shape[1]).to(torch.int32)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo :func:`pack_words`.

    Args:
        words (torch.Tensor): ``[W, M]`` int32.
        bits (int): of a number.

    Returns:
        torch.Tensor: ``[W 32 / bits, M]`` uint8.
    """
    num_words = math.lcm(bits, _WORD_BITS) // _WORD_BITS
    together = num_words * _WORD_BITS // bits
    groups = words.view(-1, num_words, words.shape[1])
    values = torch.empty(len(groups), together, words.shape[1], dtype=torch.uint8)
    for index in range(together):
        word, shift = divmod(index * bits, _WORD_BITS)
        # A shift of a signed word brings ones along, which the mask drops.
        value = groups[:, word] >> shift
        if shift + bits > _WORD_BITS:
            low = (1 << (_WORD_BITS - shift)) - 1
            value = (value & low) | (groups[:, word + 1] << (_WORD_BITS - shift))
        values[:, index] = value & (2**bits - 1)
    return values.view(-1, words.shape[1])


def from_gptq(
    parts: Mapping[str, torch.Tensor],
    *,
    bits: int,
    form: GPTQFormat,
    group_size: int | None = None,
) -> StoredAffine:
    """Take a linear over as a GPTQ checkpoint stores it, act-order included.

    Args:
        parts (Mapping[str, torch.Tensor]): the tensors by name; ``g_idx`` may be missing.
        bits (int): of a code.
        form (GPTQFormat): how zero points are stored.
        group_size (int | None): g, which counts where a last group is not full; None: groups are
            full.

    Returns:
        StoredAffine: the same codes, scales and zero points.

    Raises:
        ValueError: if the tensors do not belong together, or channels are grouped unevenly.
    """
    codes_IO = unpack_words(parts["qweight"], bits)
    in_dim, out_dim = codes_IO.shape
    scales_GO = parts["scales"].float()
    zeros_GO = unpack_words(parts["qzeros"].T.contiguous(), bits).T
    if form == "gptq":
        zeros_GO = (zeros_GO + 1) & (2**bits - 1)
    if scales_GO.shape != zeros_GO.shape or scales_GO.shape[1] != out_dim:
        raise ValueError(
            f"scales {tuple(scales_GO.shape)} and zero points {tuple(zeros_GO.shape)} are not "
            f"those of {out_dim} x {in_dim} codes"
        )
    group_size = group_size_of(in_dim, len(scales_GO), group_size)
    order = group_order(parts.get("g_idx"), in_dim, group_size)
    if order is not None:
        codes_IO = codes_IO[order]
    layout = AffineLayout(bits, group_size, in_dim)
    return stored_affine(codes_IO.T, scales_GO.T, zeros_GO.T, layout, order)


def group_size_of(in_dim: int, num_groups: int, group_size: int | None = None) -> int:
    """Return how many input channels of a weight share a scale.

    Args:
        in_dim (int): I.
        num_groups (int): G.
        group_size (int | None): what a config says of the whole model, if it fits this weight.

    Returns:
        int: g.
    """
    if group_size and -(-in_dim // group_size) == num_groups:
        return min(group_size, in_dim)
    return -(-in_dim // num_groups)


def group_order(g_idx: torch.Tensor | None, in_dim: int, group_size: int) -> torch.Tensor | None:
    """Order the input channels group after group.

    Args:
        g_idx (torch.Tensor | None): ``[I]``, group of each input channel; None: each
            ``group_size`` of them.
        in_dim (int): I.
        group_size (int): g.

    Returns:
        torch.Tensor | None: ``[I]`` int64, the channels; None if they follow each other so.

    Raises:
        ValueError: if a group has another number of channels.
    """
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
    layout: AffineLayout,
    order: torch.Tensor | None = None,
) -> StoredAffine:
    """Put a weight together, with a last group that I does not fill padded.

    Args:
        codes (torch.Tensor): ``[O, I]`` uint8, group after group.
        scale (torch.Tensor): ``[O, G]``.
        zero_point (torch.Tensor): ``[O, G]`` uint8.
        layout (AffineLayout): of its rows.
        order (torch.Tensor | None): ``[I]``, the input channel of each column.

    Returns:
        StoredAffine: contiguous.
    """
    missing = layout.num_codes - layout.in_dim
    if missing:
        codes = torch.cat([codes, zero_point[:, -1:].expand(-1, missing)], dim=1)
    parts = (codes.contiguous(), scale.float().contiguous(), zero_point.contiguous())
    return StoredAffine(AffineWeight(*parts), layout, order)
