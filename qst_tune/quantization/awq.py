"""Read the weights of AWQ directories ("gemm" packing, 4 bits).

===========  ====================  =========================================================
``qweight``  int32 [I, O / 8]      codes, eight output channels a word
``qzeros``   int32 [G, O / 8]      zero points, packed in the same way
``scales``   fp16 [G, O]           scales
===========  ====================  =========================================================

From its lowest bits on, a word contains the channels 0, 2, 4, 6, 1, 3, 5, 7.

Source: ``WQLinear_GEMM`` and ``packing_utils`` of github.com/casper-hansen/AutoAWQ.
"""

from collections.abc import Mapping

import torch

from qst_tune.quantization.gptq import stored_affine
from qst_tune.quantization.stored import StoredAffine

BITS = 4
# Where in a word each of eight channels is.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def from_awq(parts: Mapping[str, torch.Tensor]) -> StoredAffine:
    """Read a linear of three tensors; those that do not belong together are a ValueError."""
    codes_IO, zeros_GO = _unpack(parts["qweight"]), _unpack(parts["qzeros"])
    return stored_affine(codes_IO.T, parts["scales"].T, zeros_GO.T, bits=BITS)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """``[N, M]`` int32 to ``[N, 8 M]`` uint8."""
    shifts = torch.tensor([BITS * place for place in _PLACES], dtype=torch.int32)
    values = (words.unsqueeze(-1) >> shifts) & (2**BITS - 1)
    unpacked: torch.Tensor = values.to(torch.uint8).flatten(1)
    return unpacked
