"""Each downsampler against its equation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qst_tune.modules.side.downsample import build_downsample, dequantize_blocks, quantize_blocks

KINDS = ["linear", "lora", "adapter", "maxpool", "avgpool"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def silu_by_hand(x):
    return x / (1 + torch.exp(-x))


def gelu_by_hand(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def layer_norm_by_hand(x, module):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * module.weight + module.bias


@pytest.mark.parametrize("norm", [True, False])
def test_linear_is_a_matrix_product(norm):
    down = build_downsample("linear", 12, 5, rank=3, norm=norm)
    h = torch.randn(2, 7, 12)
    assert sum(p.numel() for p in down.parameters()) == 12 * 5
    torch.testing.assert_close(down(h), h @ down.reduce.weight.T, **CLOSE)


@pytest.mark.parametrize("norm", [True, False])
def test_lora_is_two_matrix_products(norm):
    """norm belongs to the adapter; a LoRA has none."""
    down = build_downsample("lora", 12, 5, rank=3, norm=norm)
    h = torch.randn(2, 7, 12)
    assert sum(p.numel() for p in down.parameters()) == 12 * 3 + 3 * 5
    torch.testing.assert_close(down(h), h @ down.reduce.weight.T @ down.expand.weight.T, **CLOSE)


@pytest.mark.parametrize("norm", [True, False])
def test_adapter_has_a_silu_between_and_perhaps_a_norm_behind(norm):
    down = build_downsample("adapter", 12, 5, rank=3, norm=norm)
    h = torch.randn(2, 7, 12)
    expected = silu_by_hand(h @ down.reduce.weight.T) @ down.expand.weight.T
    if norm:
        nn.init.uniform_(down.norm.weight)
        nn.init.normal_(down.norm.bias)
        expected = layer_norm_by_hand(expected, down.norm)
    assert sum(p.numel() for p in down.parameters()) == 12 * 3 + 3 * 5 + (10 if norm else 0)
    torch.testing.assert_close(down(h), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "by_hand"),
    [
        ("silu", silu_by_hand),
        ("relu", lambda x: x * (x > 0)),
        ("gelu", gelu_by_hand),
        ("identity", lambda x: x),
    ],
)
def test_an_adapters_activation_is_the_one_named(activation, by_hand):
    down = build_downsample("adapter", 12, 5, rank=3, activation=activation)
    h = torch.randn(2, 7, 12)
    expected = by_hand(h @ down.reduce.weight.T) @ down.expand.weight.T
    torch.testing.assert_close(down(h), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_drops_channels_of_the_hidden_state_in_training_only(kind):
    """The authors' code drops nothing: its switch is inverted (QSTConfig.py)."""
    dim = 256
    down = build_downsample(kind, dim, dim, rank=dim, activation="identity", dropout=0.25)
    for parameter in down.parameters():
        parameter.data = torch.eye(dim)
    h = torch.ones(64, dim)
    seen = down(h)
    assert seen.unique().tolist() == pytest.approx([0, 4 / 3])
    # 4 standard deviations of a share of 64 x 256 draws.
    assert (seen == 0).float().mean().item() == pytest.approx(0.25, abs=4 * 0.433 / 128)
    assert not torch.equal(down(h), seen)
    down.eval()
    assert torch.equal(down(h), h)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [16, 8])
def test_what_was_read_is_dropped_once_and_for_all(kind, bits):
    """Computing again from what was read, as recomputation does, draws no other mask."""
    down = build_downsample(kind, 128, 8, rank=3, hidden_bits=bits, dropout=0.5)
    kept = down.read(torch.randn(2, 3, 128))
    assert torch.equal(down.project(*kept), down.project(*kept))


@pytest.mark.parametrize("kind", ["maxpool", "avgpool"])
@pytest.mark.parametrize(("in_dim", "out_dim"), [(12, 4), (12, 12), (12, 1), (13, 5), (100, 6)])
def test_pooling_equals_a_loop_over_its_windows(in_dim, out_dim, kind):
    down = build_downsample(kind, in_dim, out_dim, rank=1, norm=True)
    h = torch.randn(2, 3, in_dim)
    pool = torch.amax if kind == "maxpool" else torch.mean
    windows = [
        pool(h[..., j * in_dim // out_dim : math.ceil((j + 1) * in_dim / out_dim)], dim=-1)
        for j in range(out_dim)
    ]
    assert not list(down.parameters())
    torch.testing.assert_close(down(h), torch.stack(windows, dim=-1), **CLOSE)
    adaptive = F.adaptive_max_pool1d if kind == "maxpool" else F.adaptive_avg_pool1d
    torch.testing.assert_close(down(h), adaptive(h, out_dim), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("out_dim", [4, 5])
def test_any_number_of_leading_dimensions_is_kept(shape, out_dim, kind):
    down = build_downsample(kind, 12, out_dim, rank=3, norm=True)
    assert down(torch.randn(shape)).shape == (*shape[:-1], out_dim)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("pool")])
@pytest.mark.parametrize("out_dim", [3, 5])
def test_gradients_of_every_parameter_are_right(out_dim, kind):
    """Against finite differences in float64."""
    down = build_downsample(kind, 12, out_dim, rank=3, norm=True, activation="gelu").double()
    h = torch.randn(2, 2, 12, dtype=torch.float64)
    names = [name for name, _ in down.named_parameters()]

    def run(*parameters):
        return torch.func.functional_call(down, dict(zip(names, parameters, strict=True)), (h,))

    assert torch.autograd.gradcheck(run, tuple(down.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_reading_then_projecting_is_the_whole_and_reading_keeps_no_graph(kind):
    down = build_downsample(kind, 12, 4, rank=3, norm=True)
    h = torch.randn(2, 3, 12, requires_grad=True)
    kept = down.read(h)
    assert not any(tensor.grad_fn for tensor in kept)
    assert torch.equal(down.project(*kept), down(h))


@pytest.mark.parametrize("kind", ["linear", "maxpool", "avgpool"])
def test_kinds_without_a_rank_ignore_it(kind):
    assert build_downsample(kind, 12, 4, rank=0, norm=True)(torch.randn(1, 12)).shape == (1, 4)


@pytest.mark.parametrize("kind", ["linear", "lora", "adapter"])
def test_fewer_bits_compute_with_the_decoded_state_in_both_directions(kind):
    """Not an approximate gradient: the exact one of a slightly rounded input."""
    exact = build_downsample(kind, 128, 5, rank=3)
    coarse = build_downsample(kind, 128, 5, rank=3, hidden_bits=8)
    coarse.load_state_dict(exact.state_dict())
    h = torch.randn(2, 7, 128)
    rounded = dequantize_blocks(*quantize_blocks(h))
    weights = torch.randn(2, 7, 5)
    for down, seen in ((exact, rounded), (coarse, h)):
        (down(seen) * weights).sum().backward()
    torch.testing.assert_close(coarse(h), exact(rounded), **CLOSE)
    for name, parameter in coarse.named_parameters():
        torch.testing.assert_close(parameter.grad, exact.get_parameter(name).grad, **CLOSE)


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
