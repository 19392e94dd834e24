"""Integer weights of compressed-tensors decode to the numbers that a literal writer drew."""

import pytest
import torch

from qst_tune.quantization.compressed_tensors import from_pack_quantized
from tests.reference import stored_formats as formats


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
# 36 and 20 fill no whole words.
@pytest.mark.parametrize(("shape", "group_size"), [((16, 64), 32), ((20, 36), 12), ((8, 32), 32)])
def test_codes_scales_and_zero_points_are_taken_over_exactly(
    shape, group_size: int, bits: int, symmetric: bool
) -> None:
    parts, dense = formats.pack_quantized(
        *shape,
        torch.Generator().manual_seed(0),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
    )
    assert torch.equal(from_pack_quantized(parts, bits=bits).dense(torch.float32), dense)


def test_act_order_is_undone() -> None:
    parts, dense = formats.pack_quantized(16, 64, torch.Generator().manual_seed(0))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    columns = torch.argsort(order)
    codes = dense / parts["weight_scale"].float().repeat_interleave(32, 1) + 8
    shuffled = {
        **parts,
        "weight_packed": formats.pack_rows(codes.round().long()[:, columns], 4),
        "weight_g_idx": (torch.arange(64) // 32)[columns].int(),
    }
    decoded = from_pack_quantized(shuffled, bits=4).dense(torch.float32)
    assert torch.equal(decoded, dense[:, columns])


def test_parts_that_do_not_belong_together_are_refused() -> None:
    parts, _ = formats.pack_quantized(16, 64, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"\(8, 64\) codes are not those of 16 x 64"):
        from_pack_quantized({**parts, "weight_packed": parts["weight_packed"][:8]}, bits=4)
