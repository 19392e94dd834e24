"""Few tokens through a quantised weight: torch's int8 kernel, and when another one is taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.quantization import kernels
from qst_tune.quantization.kernels import affine_product, int8_product, int8_weight

BF16 = torch.bfloat16


def test_each_card_of_a_machine_is_tried_by_itself(monkeypatch):
    pytest.importorskip("triton")
    ages, tried = [(8, 6), (7, 5), (9, 0)], []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ages[device.index])
    monkeypatch.setattr(kernels, "passes_trial", lambda device: tried.append(device) or True)
    runs = [kernels._runs_triton_on.__wrapped__(torch.device("cuda", n)) for n in range(3)]
    assert (runs, tried) == ([True, False, True], ["cuda:0", "cuda:2"])


def own(linear: PEQALinear) -> tuple:
    return linear.codes, linear.weight_scale, linear.zero_point, linear.layout


@pytest.mark.parametrize("shape", [(192, 576), (33, 64), (7, 32)])
@pytest.mark.parametrize("num_tokens", [1, 5, 64])
@torch.no_grad()
def test_an_int8_product_is_as_exact_as_that_of_the_decoded_weight(shape, num_tokens):
    linear = PEQALinear(torch.randn(shape) * 0.02, torch.randn(shape[0]).to(BF16), bits=8)
    x = torch.randn(2, num_tokens, shape[1]).to(BF16)[:1]
    exact = F.linear(x.double(), linear.dense_weight(torch.float64), linear.bias.double())
    with torch.enable_grad():
        decoded = linear(x)
    few = linear(x)
    assert (few.dtype, few.shape) == (BF16, exact.shape)
    assert torch.equal(few, affine_product(x, *own(linear)) + linear.bias)
    # Both round twice to 8 bits of mantissa, of sums that differ by the zero points' share.
    error, usual = ((y - exact).square().mean().sqrt() for y in (few, decoded))
    assert error < 1.3 * usual + 1e-6


@pytest.mark.parametrize("zero_point", [0, 1, 127, 128, 255])
@torch.no_grad()
def test_every_zero_point_is_taken_out_of_the_product_again(zero_point):
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32)
    zero = torch.full((8, 1), zero_point, dtype=torch.uint8)
    x = torch.eye(32, dtype=BF16)[:4]  # whole numbers below 256 are exact in bf16
    y = int8_product(int8_weight(codes ^ 128, torch.ones(8, 1), zero), x)
    assert torch.equal(y, (codes.float() - zero_point).T[:4].to(BF16))


@pytest.mark.parametrize(
    ("settings", "dtype", "num_tokens"),
    [
        ({"bits": 4}, BF16, 1),
        ({"bits": 8, "group_size": 32}, BF16, 1),
        ({"bits": 8, "train_zero_points": True}, BF16, 1),
        ({"bits": 8}, torch.float32, 1),
        ({"bits": 8}, BF16, 65),
        ({"bits": 8}, BF16, 0),
    ],
)
@torch.no_grad()
def test_what_the_kernel_does_not_take_is_decoded(settings, dtype, num_tokens):
    linear = PEQALinear(torch.randn(16, 64), **settings)
    x = torch.randn(num_tokens, 64).to(dtype)
    assert affine_product(x, *own(linear)) is None
    dense = linear.dense_weight(dtype)
    torch.testing.assert_close(linear(x), F.linear(x, dense), rtol=2e-2, atol=2e-1)


@torch.no_grad()
def test_rows_that_are_not_of_whole_vectors_are_decoded():
    linear = PEQALinear(torch.randn(36, 50), bits=8)
    assert affine_product(torch.randn(1, 50).to(BF16), *own(linear)) is None


def test_where_a_gradient_is_wanted_the_weight_is_decoded():
    linear = PEQALinear(torch.randn(16, 64), bits=8)
    x = torch.randn(1, 64, requires_grad=True)
    linear(x.to(BF16)).sum().backward()
    assert x.grad is not None
    assert linear.weight_scale.grad is not None


@pytest.mark.parametrize(
    "make", [NF4Linear, lambda w: PEQALinear(w, bits=4, group_size=64)], ids=["nf4", "int4"]
)
@torch.no_grad()
def test_where_triton_runs_the_layers_decode_by_its_kernels(make, triton_device, monkeypatch):
    """On a CPU the layers are told that the interpreter is a GPU."""
    from qst_tune.quantization import triton_decoding

    linear: nn.Module = make(torch.randn(32, 64)).to(triton_device)
    x = torch.randn(100, 64, device=triton_device)
    expected = F.linear(x, linear.dense_weight(torch.float32))
    monkeypatch.setattr("qst_tune.quantization.kernels._runs_triton_on", lambda _: True)
    name = "decode_nf4" if make is NF4Linear else "decode_affine"
    decode, calls = getattr(triton_decoding, name), []

    def counted(*args):
        calls.append(name)
        return decode(*args)

    monkeypatch.setattr(triton_decoding, name, counted)
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)
    assert calls == [name]
