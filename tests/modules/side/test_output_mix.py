"""Each output mix against its equation."""

import math

import pytest
import torch

from qst_tune.modules.side.output_mix import build_output_mix


@pytest.mark.parametrize("num_channels", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_mix_is_the_papers_equation(num_channels, dtype):
    mix = build_output_mix("alpha", num_channels).to(dtype)
    f, u = torch.randn(2, 2, 3, 6, dtype=dtype)
    assert torch.equal(mix(f, u), f)  # alpha starts at 1
    with torch.no_grad():
        mix.alpha.uniform_(-1, 2)
    assert mix.alpha.shape == (num_channels,)
    torch.testing.assert_close(mix(f, u), mix.alpha * f + (1 - mix.alpha) * u)


@pytest.mark.parametrize("num_channels", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["sigmoid", "swapped_sigmoid"])
def test_sigmoid_mix_is_the_authors_equation(num_channels, dtype, kind):
    mix = build_output_mix(kind, num_channels).to(dtype)
    first, second = torch.randn(2, 2, 3, 6, dtype=dtype)
    f, u = (first, second) if kind == "sigmoid" else (second, first)
    start = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(mix(f, u), start * first + (1 - start) * second)
    with torch.no_grad():
        mix.logit.uniform_(-3, 3)
    weight = 1 / (1 + torch.exp(-mix.logit))
    assert mix.logit.shape == (num_channels,)
    torch.testing.assert_close(mix(f, u), (1 - weight) * second + weight * first)


@pytest.mark.parametrize("num_channels", [1, 6])
@pytest.mark.parametrize(
    ("kind", "weight"), [("alpha", 0.25), ("sigmoid", 1 / (1 + math.e**-0.25))]
)
def test_a_mix_can_start_elsewhere(kind, weight, num_channels):
    mix = build_output_mix(kind, num_channels, 0.25)
    f, u = torch.randn(2, 2, 3, 6)
    torch.testing.assert_close(mix(f, u), weight * f + (1 - weight) * u)
    assert [p.shape for p in mix.parameters()] == [(num_channels,)]
    start = mix(f, u)
    torch.nn.init.zeros_(next(mix.parameters()))
    mix.reset_parameters()  # what a model built on meta calls
    assert torch.equal(mix(f, u), start)


def test_residual_mix_adds_and_has_no_parameters():
    mix = build_output_mix("residual", 6)
    f, u = torch.randn(2, 2, 3, 6)
    assert torch.equal(mix(f, u), f + u)
    assert not list(mix.parameters())


@pytest.mark.parametrize("kind", ["residual", "alpha", "sigmoid", "swapped_sigmoid"])
def test_fp32_parameters_leave_a_bfloat16_state_bfloat16(kind):
    mix = build_output_mix(kind, 1)
    f, u = torch.randn(2, 2, 3, 6).bfloat16()
    y = mix(f, u.requires_grad_())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in mix.parameters())


@pytest.mark.parametrize("num_channels", [1, 4])
@pytest.mark.parametrize("kind", ["residual", "alpha", "sigmoid", "swapped_sigmoid"])
def test_gradients_are_right(kind, num_channels):
    mix = build_output_mix(kind, num_channels).double()
    f, u = torch.randn(2, 2, 3, 4, dtype=torch.float64).unbind()
    names = [name for name, _ in mix.named_parameters()]

    def run(f, u, *parameters):
        return torch.func.functional_call(mix, dict(zip(names, parameters, strict=True)), (f, u))

    assert torch.autograd.gradcheck(
        run, (f.requires_grad_(), u.requires_grad_(), *mix.parameters())
    )


def test_under_alpha_one_the_side_network_has_no_gradient_and_under_the_residual_it_has():
    """Why the default variant is not the paper's (stated in ResidualMix)."""
    f, u = torch.randn(2, 2, 3, 4).unbind()
    for kind, expected in (("alpha", 0.0), ("residual", 1.0)):
        leaf = u.clone().requires_grad_()
        build_output_mix(kind, 1)(f, leaf).sum().backward()
        assert torch.equal(leaf.grad, torch.full_like(u, expected))
