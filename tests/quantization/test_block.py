import pytest
import torch

from qst_tune.quantization.block import dequantize_blocks, quantize_blocks


def round_trip(x):
    return dequantize_blocks(*quantize_blocks(x))


def block_absmax(x):
    """Largest magnitude of each number's block of 64, in plain loops."""
    rows = x.reshape(-1, x.shape[-1])
    largest = torch.empty_like(rows)
    for row in range(len(rows)):
        for start in range(0, rows.shape[1], 64):
            largest[row, start : start + 64] = rows[row, start : start + 64].abs().max()
    return largest.view_as(x)


@pytest.mark.parametrize("dim", [2, 36, 64, 100, 576])
def test_the_error_is_at_most_half_a_step_of_the_block(dim):
    x = torch.randn(3, 5, dim) * torch.rand(3, 5, 1) * 10
    step = block_absmax(x) / 127
    # 1e-5: fp32 rounding of the division and the product.
    assert ((round_trip(x) - x).abs() <= step * (0.5 + 1e-5)).all()


def test_a_huge_channel_spoils_only_its_own_block():
    x = torch.randn(4, 128)
    spoiled = x.clone()
    spoiled[:, 3] = 1e4
    assert torch.equal(round_trip(spoiled)[:, 64:], round_trip(x)[:, 64:])


def test_zeros_stay_zeros_and_codes_are_fixed_points():
    assert torch.equal(round_trip(torch.zeros(2, 64)), torch.zeros(2, 64))
    once = round_trip(torch.randn(2, 130))
    torch.testing.assert_close(round_trip(once), once, rtol=1e-6, atol=0)


def test_a_token_takes_the_bytes_it_should():
    codes, scale = quantize_blocks(torch.randn(1, 576, dtype=torch.bfloat16))
    assert codes.nbytes + scale.nbytes == 576 + 2 * 9


def test_a_bf16_round_trip_stays_bf16():
    assert round_trip(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
