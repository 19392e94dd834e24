"""The side network on its own: gates, composition, initial values, dtypes, adapter protocol."""

import pytest
import torch
from torch import nn
from torchtune.modules.peft import disable_adapter, get_adapter_params, set_trainable_params

from qst_tune.models import qst_decoder
from qst_tune.modules.side.network import ZeroLinear, evenly_spaced_layers
from tests.support.numbers import random_tokens, tiny_backbone
from tests.support.side_networks import assert_documented_initial_values, side_of, toy_side


def run(side, hidden_states, f):
    g = side.start(hidden_states[0])
    for index, h in enumerate(hidden_states[1:]):
        g = side.step(index, h, g)
    return side.finish(f, g)


@pytest.mark.parametrize("shared_first", [True, False])
def test_the_composition_is_the_documented_one(shared_first):
    """N + 1 downsamplers: one for each state; N: the first serves the embedding and layer 1."""
    side = toy_side(num_downsamplers=2 if shared_first else 3)
    hidden = [torch.randn(2, 4, 6) for _ in range(3)]
    f = torch.randn(2, 4, 6)
    with torch.no_grad():
        side.output_mix.alpha.fill_(0.3)
    for_state = [0, 0, 1] if shared_first else [0, 1, 2]
    down = [side.downsample[index](h) for index, h in zip(for_state, hidden, strict=True)]
    beta = torch.sigmoid(torch.tensor(0.3))
    g = down[0]
    for block, d in zip(side.blocks, down[1:], strict=True):
        g = block((1 - beta) * d + beta * g)
    expected = 0.3 * f + 0.7 * side.upsample(side.norm(g))
    torch.testing.assert_close(run(side, hidden, f), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared_first", [True, False])
def test_gradients_are_right(shared_first):
    """For every parameter and f, against finite differences in float64."""
    side = toy_side(num_downsamplers=2 if shared_first else 3, gamma_channels=3).double()
    with torch.no_grad():
        side.output_mix.alpha.fill_(0.3)
    hidden = [torch.randn(1, 3, 6, dtype=torch.float64) for _ in range(3)]
    f = torch.randn(1, 3, 6, dtype=torch.float64)
    names = [name for name, _ in side.named_parameters()]

    class Run(nn.Module):
        def __init__(self):
            super().__init__()
            self.side = side

        def forward(self):
            return run(self.side, hidden, f)

    def of_parameters(*parameters):
        state = {f"side.{n}": p for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Run(), state, ())

    assert torch.autograd.gradcheck(of_parameters, tuple(side.parameters()))


@pytest.mark.parametrize("variant", ["default", "paper", "authors"])
def test_initial_values_are_the_documented_ones(variant):
    assert_documented_initial_values(side_of(variant), variant)


def test_zero_linear_starts_at_zero_with_and_without_bias():
    for bias in (True, False):
        layer = ZeroLinear(3, 5, bias=bias)
        assert not any(parameter.any() for parameter in layer.parameters())
        nn.init.ones_(layer.weight)
        assert torch.equal(layer(torch.ones(1, 3)), torch.full((1, 5), 3.0))


def test_adapter_params_name_every_parameter():
    model = qst_decoder(tiny_backbone(), reduction_factor=4)
    names = model.side.adapter_params()
    assert names == [name for name, _ in model.side.named_parameters()]
    adapter = get_adapter_params(model)
    assert set(adapter) == {f"side.{name}" for name in names}
    model.requires_grad_(True)
    set_trainable_params(model, adapter)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter)


def test_disable_adapter_switches_off_and_on_again():
    model = qst_decoder(tiny_backbone(), reduction_factor=4, variant="authors")
    tokens = random_tokens()
    enabled = model(tokens)
    with disable_adapter(model):
        assert model.side.disabled
        assert not torch.equal(model(tokens), enabled)
    assert not model.side.disabled
    assert torch.equal(model(tokens), enabled)


@pytest.mark.parametrize(
    ("num_blocks", "num_layers", "beside"),
    [
        (6, 30, [4, 9, 14, 19, 24, 29]),
        (6, 32, [4, 9, 15, 20, 25, 31]),
        (1, 7, [6]),
        (3, 3, [0, 1, 2]),
    ],
)
def test_side_blocks_are_evenly_spaced_and_the_last_is_beside_the_last_layer(
    num_blocks, num_layers, beside
):
    assert evenly_spaced_layers(num_blocks, num_layers) == beside


@pytest.mark.parametrize("num_blocks", [-1, 4])
def test_more_blocks_than_layers_or_fewer_than_none_are_refused(num_blocks):
    with pytest.raises(ValueError, match=f"num_side_blocks={num_blocks} must be from 0 to .* 3"):
        evenly_spaced_layers(num_blocks, 3)
