"""The generic builder: variants, arguments, signature, counts."""

import copy
import inspect

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchtune import config, training
from torchtune.config._errors import ConfigError
from torchtune.models.llama2 import llama2
from torchtune.models.qwen2 import qwen2

import qst_tune.models
from qst_tune.models import qst_builder, qst_decoder
from qst_tune.modules.backbone_formats import quantization_of
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.modules.qst_decoder import QSTDecoder
from qst_tune.modules.side.config import VARIANTS
from qst_tune.modules.side.network import ZeroLinear
from qst_tune.modules.side.output_mix import AlphaMix, ResidualMix, SigmoidMix
from qst_tune.quantization.table import QuantizedTable
from tests.support.numbers import TINY, dense_weight, random_tokens, randomize_, tiny_backbone

D, S, N, HIDDEN, R = 96, 24, 3, 25, 5  # TINY at reduction factor 4, rank 5
# Attention, MLP and the two norms of one side block: 6 heads and 3 of keys and values, or one.
BLOCK_OF_SIX = 2 * S * S + 2 * S * (S // 2) + 3 * S * HIDDEN + 2 * S
BLOCK = BLOCK_OF_SIX + 2 * S * (S // 2)
LOW_RANK = D * R + R * S
TAIL = S + S * D + D  # side norm, upsampler with bias


def build(num_layers=N, **arguments):
    backbone = tiny_backbone(num_layers=num_layers)
    return qst_decoder(backbone, **{"reduction_factor": 4, "rank": R, **arguments})


def side_count(model):
    return sum(parameter.numel() for parameter in model.side.parameters())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, N * (BLOCK + 1) + (N + 1) * (LOW_RANK + 2 * S) + TAIL),
        ({"num_side_blocks": 2}, 2 * (BLOCK + 1) + 3 * (LOW_RANK + 2 * S) + TAIL),
        ({"variant": "paper"}, N * (BLOCK_OF_SIX + 1) + (N + 1) * LOW_RANK + TAIL + 1),
        ({"variant": "authors"}, N * (BLOCK_OF_SIX + S + LOW_RANK + 2 * S) + TAIL + D),
        ({"downsample": "linear"}, N * (BLOCK + 1) + (N + 1) * D * S + TAIL),
        ({"downsample": "lora"}, N * (BLOCK + 1) + (N + 1) * LOW_RANK + TAIL),
        ({"downsample": "maxpool"}, N * (BLOCK + 1) + TAIL),
        ({"downsample": "avgpool"}, N * (BLOCK + 1) + TAIL),
        ({"rank": 7}, N * (BLOCK + 1) + (N + 1) * (7 * D + 7 * S + 2 * S) + TAIL),
    ],
)
def test_trainable_parameters_equal_the_hand_formula(arguments, expected):
    model = build(**arguments)
    assert side_count(model) == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


MIXES = {"residual": ResidualMix, "alpha": AlphaMix, "sigmoid": SigmoidMix}
DEEP = 8  # layers, so that the default's 6 side blocks show
# Written out from the documentation, not read from VARIANTS.
PRESETS = {
    "default": ("adapter", 16, "residual", False, False, 0.0, False, True, 24, 6, True),
    "paper": ("adapter", 16, "alpha", False, False, 0.0, False, False, 4, DEEP, False),
    "authors": ("adapter", 16, "sigmoid", True, True, 0.5, True, True, 4, DEEP, False),
}


def settings_of(model):
    """What a built side network is, in the order of PRESETS."""
    side = model.side
    mix = next(kind for kind, cls in MIXES.items() if type(side.output_mix) is cls)
    gamma = side.gates[0].gamma
    per_channel = gamma.numel() == S
    assert per_channel or gamma.numel() == 1
    shares_first = len(side.downsample) == len(side.blocks)
    has_norm = isinstance(side.downsample[0].norm, nn.LayerNorm)
    # Of width 24: 4 keeps the backbone's 6 heads, and the default's 32 leaves one.
    head_dim = side.blocks[0].attn.head_dim
    down = side.downsample[0]
    rank = down.expand.in_features
    mix_sizes = [p.numel() for p in side.output_mix.parameters()]
    mix_per_channel = mix_sizes == [D] if mix_sizes else None
    start = gamma[0].item()
    shape = (head_dim, len(side.blocks), side.config.normalize_hidden)
    return "adapter", rank, mix, mix_per_channel, per_channel, start, shares_first, has_norm, *shape


def described(preset):
    """A residual mix has no parameters, so nothing shows how many there would be."""
    return tuple(None if i == 3 and preset[2] == "residual" else v for i, v in enumerate(preset))


@pytest.mark.parametrize("variant", PRESETS)
def test_a_variant_is_what_the_documentation_says(variant):
    model = build(DEEP, variant=variant, rank=None)
    assert settings_of(model) == described(PRESETS[variant])


ARGUMENTS = (
    "downsample", "rank", "output_mix", "mix_per_channel", "gate_per_channel", "initial_gamma",
    "share_first_downsample", "downsample_norm", "min_head_dim", "num_side_blocks",
    "normalize_hidden",
)  # fmt: skip


@pytest.mark.parametrize("variant", PRESETS)
@pytest.mark.parametrize("index", range(len(ARGUMENTS)))
def test_every_preset_can_be_overridden_alone(index, variant):
    """False and 0.0 too, which a careless ``or`` would take for "not given"."""
    for other in PRESETS.values():
        expected = list(PRESETS[variant])
        expected[index] = other[index]
        model = build(DEEP, **{"variant": variant, "rank": None, ARGUMENTS[index]: other[index]})
        assert settings_of(model) == described(expected)


def test_the_upsampler_starts_at_zero_only_under_the_residual_mix():
    for kind in MIXES:
        upsample = build(output_mix=kind).side.upsample
        assert (type(upsample) is ZeroLinear) == (kind == "residual")
        assert bool(upsample.weight.any()) == (kind != "residual")


def test_each_choice_outside_the_presets_reaches_its_module():
    side = build(
        variant="authors",
        initial_mix=0.25,
        initial_gamma=0.125,
        activation="relu",
        dropout=0.1,
    ).side
    assert torch.equal(side.output_mix.logit, torch.full((D,), 0.25))
    assert [gate.gamma[0].item() for gate in side.gates] == [0.125] * 3
    for down in side.downsample:
        assert isinstance(down.activation, nn.ReLU)
        assert down.dropout == 0.1


def test_mixes_have_the_channels_of_paper_and_code():
    assert build(variant="paper").side.output_mix.alpha.shape == (1,)
    assert build(variant="authors").side.output_mix.logit.shape == (D,)


@pytest.mark.parametrize(
    "name",
    [
        "variant",
        "output_mix",
        "downsample",
        "base_quantization",
        "embedding_quantization",
        "activation",
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"{name}='nonsense' is unknown; choose one of"):
        build(**{name: "nonsense"})


def test_an_odd_weight_is_refused_only_if_it_is_quantised():
    def odd_backbone():
        backbone = tiny_backbone()
        backbone.layers[1].mlp.w1 = nn.Linear(13, 7, bias=False)
        return backbone

    with pytest.raises(ValueError, match="91 elements cannot be stored in 4 bits"):
        qst_decoder(odd_backbone(), reduction_factor=4)
    assert qst_decoder(odd_backbone(), reduction_factor=4, quantize_base=False)


@pytest.mark.parametrize("quantize_base", [True, False])
def test_quantize_base_decides_what_the_backbone_is(quantize_base):
    backbone = tiny_backbone()
    weights = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    model = qst_decoder(backbone, reduction_factor=4, quantize_base=quantize_base)
    assert isinstance(model.layers[0].attn.q_proj, NF4Linear) == quantize_base
    now = {name: dense_weight(parameter) for name, parameter in model.named_parameters()}
    unchanged = {name for name in weights if torch.equal(weights[name], now[name])}
    expected = {n for n in weights if "norm" in n or not (quantize_base and n.startswith("layers"))}
    assert unchanged == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "nf4"),
        ({"base_quantization": "fp4"}, "fp4"),
        ({"base_quantization": "none"}, "none"),
        ({"quantize_base": False}, "none"),
        ({"quantize_base": False, "base_quantization": "none"}, "none"),
    ],
)
def test_base_quantization_names_the_format(arguments, expected):
    assert quantization_of(build(**arguments).layers) == expected


def test_embedding_quantization_is_of_embedding_and_head():
    model = build(embedding_quantization="int8")
    found = {n for n, p in model.named_parameters() if isinstance(p, QuantizedTable)}
    assert found == {"tok_embeddings.weight", "output.weight"}
    assert quantization_of(model.layers) == "nf4"


def test_a_format_beside_quantize_base_false_is_refused():
    with pytest.raises(ValueError, match="quantize_base=False and base_quantization='fp4' contra"):
        build(quantize_base=False, base_quantization="fp4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_side_network_is_fp32_whatever_the_default_dtype(dtype):
    with training.set_default_dtype(dtype):
        model = build()
        assert torch.get_default_dtype() == dtype
    assert {parameter.dtype for parameter in model.side.parameters()} == {torch.float32}


def test_a_backbone_on_meta_gives_a_side_network_on_meta():
    with torch.device("meta"):
        backbone = tiny_backbone()
    model = qst_decoder(backbone, reduction_factor=4)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert set(model.state_dict()) == set(build().state_dict())


def test_state_dict_keys_are_those_of_the_backbone_and_the_side_network():
    keys = set(build().state_dict())
    assert {key for key in keys if not key.startswith("side.")} == set(tiny_backbone().state_dict())
    forbidden = ("lora", "magnitude", ".layers.")  # stock torchtune code matches on these
    side = {key for key in keys if key.startswith("side.")}
    assert not [key for key in side if any(word in key for word in forbidden)]


@pytest.mark.parametrize("name", ["rope_init", "initialize_dora_magnitude"])
def test_the_side_networks_own_modules_lack_what_stock_recipes_call(name):
    model = build()
    own = [model.side, *model.side.gates, *model.side.downsample, model.side.output_mix]
    assert not [module for module in own if hasattr(module, name)]


def test_a_builder_passes_each_argument_to_its_own_side():
    build_qst = qst_builder(llama2)
    model = build_qst(**TINY, attn_dropout=0.2, reduction_factor=8, downsample="linear")
    assert isinstance(model, QSTDecoder)
    assert model.layers[0].attn.attn_dropout == 0.2
    assert model.side.upsample.in_features == 12
    assert sum(p.numel() for p in model.side.downsample.parameters()) == (N + 1) * D * 12


def test_a_builders_signature_lists_the_arguments_of_both():
    signature = inspect.signature(qst_builder(llama2))
    backbone = list(inspect.signature(llama2).parameters)
    side = list(inspect.signature(qst_decoder).parameters)[1:]
    assert list(signature.parameters) == backbone + side
    assert signature.parameters["reduction_factor"].default == 16
    assert signature.parameters["vocab_size"].default is inspect.Parameter.empty


def test_a_builder_has_a_name_and_a_docstring():
    build_qst = qst_builder(qwen2)
    assert build_qst.__name__ == build_qst.__qualname__ == "qst_qwen2"
    assert "qwen2" in build_qst.__doc__


@pytest.mark.parametrize("name", [n for n in qst_tune.models.__all__ if n.startswith("qst_smol")])
def test_validate_accepts_a_right_config_and_rejects_a_misspelt_argument(name):
    component = f"qst_tune.models.{name}"
    right = {"_component_": component, "reduction_factor": 8, "downsample": "lora"}
    config.validate(OmegaConf.create({"model": right}))
    wrong = {"_component_": component, "reduction_factr": 8}
    with pytest.raises(ConfigError, match="reduction_factr"):
        config.validate(OmegaConf.create({"model": wrong}))


def test_a_config_builds_the_model_it_describes():
    node = {
        "_component_": "qst_tune.models.qst_llama2",
        **TINY,
        "reduction_factor": 4,
        "rank": R,
        "variant": "authors",
        "initial_gamma": 0.0,
    }
    model = config.instantiate(OmegaConf.create(node))
    assert settings_of(model) == ("adapter", R, "sigmoid", True, True, 0.0, True, True, 4, 3, False)
    assert model(random_tokens()).shape == (2, 11, TINY["vocab_size"])


def test_calling_a_builder_with_a_misspelt_argument_fails():
    with pytest.raises(TypeError, match="reduction_factr"):
        qst_builder(llama2)(**TINY, reduction_factr=8)


def test_variants_fix_the_same_arguments():
    overridable = set(inspect.signature(qst_decoder).parameters)
    for settings in VARIANTS.values():
        assert set(settings) == set(ARGUMENTS)
        assert set(settings) <= overridable


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_over_integers_it_computes_with_the_decoded_weights_and_trains_the_side_alone(name):
    model = build(base_quantization=name)
    randomize_(model.side)
    dense = copy.deepcopy(model)
    for module in list(dense.layers.modules()):
        for attribute, child in list(module.named_children()):
            if isinstance(child, PEQALinear):
                linear = nn.Linear(child.in_features, child.out_features, bias=False)
                linear.weight = nn.Parameter(child.dense_weight(torch.float32), requires_grad=False)
                setattr(module, attribute, linear)
    tokens = random_tokens()
    logits = model(tokens)
    torch.testing.assert_close(logits, dense(tokens), rtol=1e-4, atol=1e-4)
    logits.square().mean().backward()
    assert all((p.grad is not None) == n.startswith("side.") for n, p in model.named_parameters())
