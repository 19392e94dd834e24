import pytest
import torch

from qst_tune.quantization.block import dequantize_blocks, quantize_blocks


def round_trip(x, bits):
    return dequantize_blocks(*quantize_blocks(x, bits))


def block_absmax(x):
    """Largest magnitude of each number's block of 64, in plain loops."""
    rows = x.reshape(-1, x.shape[-1])
    largest = torch.empty_like(rows)
    for row in range(len(rows)):
        for start in range(0, rows.shape[1], 64):
            largest[row, start : start + 64] = rows[row, start : start + 64].abs().max()
    return largest.view_as(x)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [2, 36, 64, 100, 576])
def test_the_error_is_at_most_half_a_step_of_the_block(bits, dim):
    x = torch.randn(3, 5, dim) * torch.rand(3, 5, 1) * 10
    step = block_absmax(x) / (127 if bits == 8 else 7)
    # 1e-5: fp32 rounding of the division and the product.
    assert ((round_trip(x, bits) - x).abs() <= step * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_huge_channel_spoils_only_its_own_block(bits):
    x = torch.randn(4, 128)
    spoiled = x.clone()
    spoiled[:, 3] = 1e4
    assert torch.equal(round_trip(spoiled, bits)[:, 64:], round_trip(x, bits)[:, 64:])


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros_and_codes_are_fixed_points(bits):
    assert torch.equal(round_trip(torch.zeros(2, 64), bits), torch.zeros(2, 64))
    once = round_trip(torch.randn(2, 130), bits)
    torch.testing.assert_close(round_trip(once, bits), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bits", "num_bytes"), [(8, 576 + 2 * 9), (4, 288 + 2 * 9)])
def test_a_token_takes_the_bytes_it_should(bits, num_bytes):
    codes, scale = quantize_blocks(torch.randn(1, 576, dtype=torch.bfloat16), bits)
    assert codes.nbytes + scale.nbytes == num_bytes


def test_a_bf16_round_trip_stays_bf16():
    assert round_trip(torch.randn(2, 64, dtype=torch.bfloat16), 8).dtype == torch.bfloat16


@pytest.mark.parametrize(("bits", "dim"), [(3, 64), (16, 64), (4, 7)])
def test_unsupported_sizes_are_refused(bits, dim):
    with pytest.raises(ValueError, match=f"{dim} channels cannot be kept in {bits} bits"):
        quantize_blocks(torch.randn(2, dim), bits)
