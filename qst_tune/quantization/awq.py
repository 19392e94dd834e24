"""Read the weights of AWQ directories ("gemm" packing, 4 bits).

===========  ====================  =========================================================
``qweight``  int32 [I, O / 8]      codes of eight output channels a word
``qzeros``   int32 [G, O / 8]      zero points, packed alike
``scales``   fp16 [G, O]           scales
===========  ====================  =========================================================

In a word, from its lowest bits on, are the channels 0, 2, 4, 6, 1, 3, 5, 7.

Source: ``WQLinear_GEMM`` and ``packing_utils`` of github.com/casper-hansen/AutoAWQ.
"""

from collections.abc import Mapping

import torch

from qst_tune.quantization.affine import AffineLayout
from qst_tune.quantization.gptq import stored_affine
from qst_tune.quantization.stored import StoredAffine

BITS = 4
# Where in a word each of eight channels is.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def from_awq(parts: Mapping[str, torch.Tensor]) -> StoredAffine:
    """Take a linear over.

    Args:
        parts (Mapping[str, torch.Tensor]): the three tensors by name.

    Returns:
        StoredAffine: the same codes, scales and zero points.

    Raises:
        ValueError: if the tensors do not belong together.
    """
    codes_IO, scales_GO = _unpack(parts["qweight"]), parts["scales"].float()
    zeros_GO = _unpack(parts["qzeros"])
    in_dim, out_dim = codes_IO.shape
    if scales_GO.shape != zeros_GO.shape or scales_GO.shape[1] != out_dim:
        raise ValueError(
            f"scales {tuple(scales_GO.shape)} and zero points {tuple(zeros_GO.shape)} are not "
            f"those of {out_dim} x {in_dim} codes"
        )
    layout = AffineLayout(BITS, in_dim // len(scales_GO), in_dim)
    return stored_affine(codes_IO.T, scales_GO.T, zeros_GO.T, layout)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """``[N, M]`` int32 to ``[N, 8 M]`` uint8."""
    shifts = torch.tensor([BITS * place for place in _PLACES], dtype=torch.int32)
    values = (words.unsqueeze(-1) >> shifts) & (2**BITS - 1)
    unpacked: torch.Tensor = values.to(torch.uint8).flatten(1)
    return unpacked
