"""Builders of PEQA models: what trains is what the paper counts."""

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config
from torchtune.config._errors import ConfigError
from torchtune.models.llama2 import llama2

import qst_tune.models
from qst_tune.models import peqa_builder, peqa_decoder
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.modules.peqa_model import PEQADecoder
from tests.support.numbers import random_tokens, tiny_backbone

# LLaMA-1: layers, heads, width, width inside the MLP, and the paper's table of trained parameters.
LLAMA = {
    "7B": (32, 32, 4096, 11008, 1.36e6),
    "13B": (40, 40, 5120, 13824, 2.13e6),
    "30B": (60, 52, 6656, 17920, 4.15e6),
    "65B": (80, 64, 8192, 22016, 6.80e6),
}


def trained(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("size", LLAMA)
def test_trained_parameters_are_the_papers(size: str) -> None:
    layers, heads, width, inner, published = LLAMA[size]
    with torch.device("meta"):
        model = peqa_builder(llama2)(
            vocab_size=32_000,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads,
            embed_dim=width,
            intermediate_dim=inner,
            max_seq_len=2048,
        )
    assert trained(model) == (5 * width + 2 * inner) * layers
    assert abs(trained(model) - published) < 0.005e6  # the paper's rounding


@pytest.mark.parametrize("group_size", [32, 64, 256])
def test_groups_train_a_scale_for_each_of_them(group_size: int) -> None:
    with torch.device("meta"):
        model = qst_tune.models.peqa_smollm2_135m(group_size=group_size)
    width, kv, inner = 576, 192, 1536
    shapes = [(width, width), (kv, width), (kv, width), (width, width)]
    shapes += [(inner, width), (inner, width), (width, inner)]
    assert trained(model) == 30 * sum(o * -(-i // group_size) for o, i in shapes)


SIZED = [n for n in qst_tune.models.__all__ if n.startswith("peqa_") and n[-1] in "bm"]


@pytest.mark.parametrize("name", SIZED)
def test_every_size_builds_on_meta(name: str) -> None:
    builder = getattr(qst_tune.models, name)
    with torch.device("meta"):
        model = builder(bits=3)
    assert isinstance(model, PEQADecoder)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    linears = [module for module in model.modules() if isinstance(module, PEQALinear)]
    assert len(linears) == 7 * len(model.layers)
    # Embedding, norms and LM head are neither quantised nor trained.
    others = (n for n in model.state_dict() if ".attn." not in n and ".mlp." not in n)
    ends = ("norm.scale", "tok_embeddings.weight", "output.weight")
    assert all(name.endswith(ends) for name in others)


def test_arguments_reach_every_linear() -> None:
    model = peqa_decoder(tiny_backbone(), bits=3, group_size=32, init="mse", train_zero_points=True)
    for module in model.modules():
        if isinstance(module, PEQALinear):
            assert (module.layout.bits, module.layout.group_size) == (3, 32)
            assert module.init == "mse"
            assert module.zero_point.requires_grad


def test_a_misspelt_argument_is_found_by_tune_validate() -> None:
    assert len(SIZED) == 10
    block = {"_component_": "qst_tune.models.peqa_smollm2_135m", "groupsize": 64}
    with pytest.raises(ConfigError, match="groupsize"):
        config.validate(OmegaConf.create({"model": block}))


def test_two_bits_warn_and_build() -> None:
    with pytest.warns(UserWarning, match="bits=2"):
        peqa_decoder(tiny_backbone(), bits=2)


@pytest.mark.parametrize(("bits", "group_size"), [(3, 1), (4, 7), (8, None), (8, 512)])
def test_all_bits_and_group_sizes_of_the_docstring_build_and_learn(bits, group_size) -> None:
    model = peqa_decoder(tiny_backbone(), bits=bits, group_size=group_size)
    model(random_tokens()).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.task().values())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"bits": 5}, "bits=5 is not supported: use 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size=0 must be at least 1, or None"),
    ],
)
def test_others_are_refused(arguments, expected) -> None:
    with pytest.raises(ValueError, match=expected):
        peqa_decoder(tiny_backbone(), **arguments)


def test_searched_scales_start_nearer_to_the_model() -> None:
    tokens = random_tokens(batch=4, length=32)
    torch.manual_seed(1)
    backbone = tiny_backbone()
    with torch.no_grad():
        for parameter in backbone.layers.parameters():
            if parameter.ndim == 2:  # heavy tails, as trained weights have
                parameter.mul_(torch.distributions.Chi2(3.0).sample(parameter.shape).rsqrt())
    exact = backbone(tokens).detach()
    state = backbone.state_dict()

    def distance(init: str) -> float:
        fresh = tiny_backbone()
        fresh.load_state_dict(state)
        return (peqa_decoder(fresh, bits=3, init=init)(tokens) - exact).square().mean().item()

    assert distance("mse") < distance("rtn")
