"""The gate interpolates between a new and a carried state."""

import pytest
import torch

from qst_tune.modules.side.gate import Gate


@pytest.mark.parametrize("num_channels", [1, 5])
def test_a_gate_interpolates(num_channels):
    gate = Gate(num_channels, 0.5)
    assert torch.equal(gate.gamma, torch.full((num_channels,), 0.5))
    with torch.no_grad():
        gate.gamma.uniform_(-3, 3)
    new, carried = torch.randn(2, 2, 3, 5)
    beta = 1 / (1 + torch.exp(-gate.gamma))
    expected = (1 - beta) * new + beta * carried
    torch.testing.assert_close(gate(new, carried), expected, rtol=1e-6, atol=1e-6)


def test_gamma_zero_weighs_both_states_alike():
    new, carried = torch.randn(2, 2, 3, 5)
    torch.testing.assert_close(Gate(1, 0)(new, carried), (new + carried) / 2)


@pytest.mark.parametrize("carried_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_returns_the_dtype_of_the_new_state(dtype, carried_dtype):
    new, carried = torch.randn(2, 3, 5).to(dtype), torch.randn(2, 3, 5).to(carried_dtype)
    assert Gate(1, 0.0)(new, carried).dtype == dtype
