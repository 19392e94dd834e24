"""Read the integer weights of compressed-tensors directories (llm-compressor).

"pack-quantized", of 4 or 8 bits:

=====================  ===========================  ===========================================
``weight_packed``      int32 [O, ceil(I b / 32)]    codes, signed ones plus 2^(b-1), along inputs
``weight_scale``       [O, G]                       scales
``weight_shape``       int64 [2]                    O and I
``weight_zero_point``  int32 [ceil(O b / 32), G]    as the codes, along outputs; symmetric: missing
``weight_g_idx``       int32 [I]                    group of each input channel; act-order only
=====================  ===========================  ===========================================

"int-quantized" stores ``weight`` int8 [O, I] and ``weight_scale`` [O, 1].

Source: ``pack_to_int32`` of github.com/neuralmagic/compressed-tensors.
"""

from collections.abc import Mapping

import torch

from qst_tune.quantization.gptq import stored_affine, unpack_words
from qst_tune.quantization.stored import StoredAffine


def from_pack_quantized(
    parts: Mapping[str, torch.Tensor], *, bits: int, group_size: int | None = None
) -> StoredAffine:
    """Read a packed linear; tensors that do not belong together are a ValueError.

    ``group_size`` is that of :func:`~qst_tune.quantization.gptq.from_gptq`.
    """
    out_dim, in_dim = (int(size) for size in parts["weight_shape"])
    scale = parts["weight_scale"].float().reshape(out_dim, -1)
    codes = unpack_words(parts["weight_packed"].T.contiguous(), bits).T[:, :in_dim]
    if codes.shape != (out_dim, in_dim):
        raise ValueError(f"{tuple(codes.shape)} codes are not those of {out_dim} x {in_dim}")
    if "weight_zero_point" in parts:
        zero_point = unpack_words(parts["weight_zero_point"].contiguous(), bits)[:out_dim]
    else:
        zero_point = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
    return stored_affine(
        codes,
        scale,
        zero_point,
        bits=bits,
        group_size=group_size,
        g_idx=parts.get("weight_g_idx"),
    )
