"""MXFP4 decodes to the numbers that a literal writer drew."""

import pytest
import torch

from qst_tune.quantization.mxfp4 import decode_mxfp4
from tests.reference import stored_formats as formats


def test_every_code_and_exponent_is_exact_in_bf16() -> None:
    parts, dense = formats.mxfp4((3, 24, 64), torch.Generator().manual_seed(0))
    decoded = decode_mxfp4(parts["blocks"], parts["scales"])
    assert decoded.dtype == torch.bfloat16
    assert torch.equal(decoded.float(), dense.transpose(1, 2))


def test_the_smallest_and_largest_exponents_are_exact() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16)
    for exponent in (2, 250):  # beyond, bf16 itself ends
        decoded = decode_mxfp4(blocks, torch.full((16,), exponent, dtype=torch.uint8))
        decoded = decoded.view(16, 32)
        low = torch.tensor(formats.MXFP4_LEVELS)[(blocks & 15).long()] * 2.0 ** (exponent - 127)
        assert torch.equal(decoded.float()[:, ::2], low)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 16\) codes with \(3,\) exponents"):
        decode_mxfp4(torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8))
