"""The side network on its own: gates, composition, initial values, dtypes, adapter protocol."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtune import training
from torchtune.models.gemma import gemma
from torchtune.modules.peft import disable_adapter, get_adapter_params, set_trainable_params

from qst_tune.models import qst_decoder
from qst_tune.modules.meta_device import materialize
from qst_tune.modules.qst_decoder import QSTDecoder
from qst_tune.modules.side.block import SideShape
from qst_tune.modules.side.config import SideConfig
from qst_tune.modules.side.gate import Gate
from qst_tune.modules.side.network import SideNetwork, ZeroLinear, evenly_spaced_layers
from tests.support.numbers import TINY, random_tokens, tiny_backbone


class ToyBlock(nn.Module):
    """Mixes channels and, causally, tokens; smooth, and float64 throughout."""

    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x, *, mask=None, input_pos=None):
        return x + torch.tanh(self.linear(x.cumsum(1)))


class ToyBackbone:
    """What a side network is built from, with toy blocks."""

    def __init__(self, width, num_layers, dim):
        self.width, self.num_layers, self.dim = width, num_layers, dim

    def side_shape(self, reduction_factor, min_head_dim):
        return SideShape(self.dim, self.dim, 1, 1)

    def side_blocks(self, layers, shape):
        return nn.ModuleList(ToyBlock(shape.embed_dim) for _ in layers)

    def side_norm(self, dim):
        return nn.LayerNorm(dim)


def toy_side(num_layers=2, num_downsamplers=None, in_dim=6, dim=3, gamma_channels=1):
    config = SideConfig(
        variant="paper",
        rank=2,
        downsample_norm=True,
        initial_gamma=0.3,
        gate_per_channel=gamma_channels > 1,
        share_first_downsample=num_downsamplers == num_layers,
    )
    return SideNetwork(ToyBackbone(in_dim, num_layers, dim), config.resolved(in_dim, num_layers))


def run(side, hidden_states, f):
    g = side.start(hidden_states[0])
    for index, h in enumerate(hidden_states[1:]):
        g = side.step(index, h, g)
    return side.finish(f, g)


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


def side_of(variant="default", **arguments):
    model = qst_decoder(tiny_backbone(), reduction_factor=4, variant=variant, **arguments)
    return model.side


def assert_documented_initial_values(side, variant):
    uniform = []
    for name, parameter in side.named_parameters():
        value = parameter.detach()
        if name.startswith("gates"):
            expected = 0.5 if variant == "authors" else 0.0
        elif name.startswith("output_mix") or name.endswith(("norm.scale", "norm.weight")):
            expected = 1.0
        elif name.endswith("norm.bias") or (variant == "default" and name.startswith("upsample")):
            expected = 0.0
        else:
            assert name.endswith("weight") or name == "upsample.bias", name
            fan_in = side.upsample.in_features if name == "upsample.bias" else value.shape[1]
            uniform.append((value * fan_in**0.5).flatten())  # nn.Linear: U(+-1/sqrt(fan_in))
            continue
        assert torch.equal(value, torch.full_like(value, expected)), name
    values = torch.cat(uniform)
    assert values.abs().max() <= 1 + 1e-6
    # Of n uniform values the largest gap in the empirical distribution is below 1.95 / sqrt(n)
    # with probability 0.999 (Kolmogorov); the seed is fixed.
    ordered = (values.sort().values + 1) / 2
    uniform_cdf = torch.linspace(0, 1, len(ordered))
    assert (ordered - uniform_cdf).abs().max() < 1.95 / len(ordered) ** 0.5
    assert len(values) > 10_000


@pytest.mark.parametrize("variant", ["default", "paper", "authors"])
def test_initial_values_are_the_documented_ones(variant):
    assert_documented_initial_values(side_of(variant), variant)


@pytest.mark.parametrize("variant", ["default", "paper", "authors"])
def test_materialising_from_meta_gives_the_same_initial_values(variant):
    with torch.device("meta"):
        side = side_of(variant)
    assert all(parameter.is_meta for parameter in side.parameters())
    materialize(side, torch.device("cpu"))
    assert {parameter.dtype for parameter in side.parameters()} == {torch.float32}
    assert_documented_initial_values(side, variant)
    rope = side.blocks[0].attn.pos_embeddings
    assert torch.equal(rope.cache, side_of(variant).blocks[0].attn.pos_embeddings.cache)
    assert not any(buffer.is_meta for buffer in side.buffers())


@pytest.mark.parametrize("variant", ["default", "paper", "authors"])
def test_gates_and_mixes_train_after_every_way_to_a_device(variant):
    """The authors' code wraps its output gate in .to(device): on a GPU it is no parameter."""
    with torch.device("meta"):
        side = side_of(variant)
    names = set(side.adapter_params())
    materialize(side, torch.device("cpu"))
    side.to(torch.device("cpu"), torch.float64).to(torch.float32)
    model = QSTDecoder(tiny_backbone(), side)
    parameters = dict(model.side.named_parameters())
    assert set(parameters) == names
    for name, parameter in parameters.items():
        assert isinstance(parameter, nn.Parameter), name
        assert parameter.requires_grad, name
        assert parameter.is_leaf, name
    if variant != "authors":  # at the start only the last layer has a gradient
        for parameter in (model.side.upsample.weight, *model.side.output_mix.parameters()):
            nn.init.constant_(parameter, 0.3)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    tokens = random_tokens()
    optimizer = torch.optim.SGD(model.side.parameters(), lr=1.0)
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    assert [name for name in names if torch.equal(parameters[name], before[name])] == []


def test_materialising_knows_gemmas_norm():
    with torch.device("meta"):
        model = qst_decoder(gemma(**TINY, head_dim=16), reduction_factor=4)
    materialize(model.side, torch.device("cpu"))
    assert not model.side.norm.scale.any()
    assert not model.side.blocks[0].sa_norm.scale.any()


def test_materialising_refuses_to_leave_memory_uninitialised():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    side = toy_side()
    side.norm = Unknown()
    with pytest.raises(ValueError, match="Unknown cannot be initialised in place"):
        materialize(side, torch.device("cpu"))


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


@pytest.mark.parametrize("variant", ["default", "paper", "authors"])
@pytest.mark.parametrize("downsample", ["linear", "lora", "adapter", "maxpool", "avgpool"])
def test_an_fp32_side_network_over_a_bfloat16_backbone(downsample, variant):
    """Products in bf16, output bf16, gradients fp32."""
    with training.set_default_dtype(torch.bfloat16):
        model = qst_decoder(
            tiny_backbone(dtype=torch.bfloat16),
            reduction_factor=4,
            downsample=downsample,
            variant=variant,
        )
    assert {parameter.dtype for parameter in model.side.parameters()} == {torch.float32}
    if variant != "authors":  # leave the start, where nothing but the last layer has a gradient
        for parameter in (model.side.upsample.weight, *model.side.output_mix.parameters()):
            nn.init.constant_(parameter, 0.3)
    products = []
    up_proj = model.side.blocks[0].mlp.w1
    up_proj.register_forward_hook(lambda module, args, output: products.append(output.dtype))
    outputs = []
    model.side.output_mix.register_forward_hook(lambda m, a, output: outputs.append(output.dtype))
    tokens = random_tokens()
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert products == [torch.bfloat16]
    assert outputs == [torch.bfloat16]
    for name, parameter in model.side.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.any(), name


def test_a_side_network_in_the_backbones_dtype_needs_no_autocast():
    model = qst_decoder(tiny_backbone(dtype=torch.bfloat16), reduction_factor=4)
    model.side.to(torch.bfloat16)
    tokens = random_tokens()
    logits = model(tokens)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    grads = {p.grad.dtype for p in model.side.parameters() if p.grad is not None}
    assert grads == {torch.bfloat16}


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


@pytest.mark.parametrize("num_blocks", [0, 4])
def test_more_blocks_than_layers_or_none_are_refused(num_blocks):
    with pytest.raises(ValueError, match=f"num_side_blocks={num_blocks} must be from 1 to .* 3"):
        evenly_spaced_layers(num_blocks, 3)
