"""Names, splits and permutations, each against torchtune's own conversion where it has one."""

import pytest
import torch
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.phi3._convert_weights import phi3_hf_to_tune

from qst_tune.errors import UserError
from qst_tune.models.hf.weights import GEMMA2_MODULES, LLAMA_MODULES, WeightConversion
from tests.checkpoints import SIZES, random_weights

HEADS, KV_HEADS, WIDTH = 4, 2, 64


def conversion(**changes) -> WeightConversion:
    settings = {"turns_neighbours": True, **changes}
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": 16}
    return WeightConversion(**{**sizes, "modules": LLAMA_MODULES, **settings})


def assert_same(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_llama_is_converted_as_torchtune_does() -> None:
    weights = {**random_weights(), "lm_head.weight": torch.randn(SIZES["vocab_size"], WIDTH)}
    expected = hf_to_tune(weights, num_heads=HEADS, num_kv_heads=KV_HEADS, dim=WIDTH)
    assert_same(conversion()(weights), expected)


def test_phi3_is_split_as_torchtune_does() -> None:
    weights = {
        "model.layers.11.self_attn.qkv_proj.weight": torch.randn((HEADS + 2 * KV_HEADS) * 16, 64),
        "model.layers.0.mlp.gate_up_proj.weight": torch.randn(192, 64),
        "model.layers.0.mlp.down_proj.weight": torch.randn(64, 96),
    }
    expected = phi3_hf_to_tune(weights, num_heads=HEADS, num_kv_heads=KV_HEADS, dim=WIDTH)
    assert_same(conversion(turns_neighbours=False)(weights), expected)


def test_any_subset_converts_alike() -> None:
    weights = random_weights()
    whole = conversion()(weights)
    parts = [conversion()({name: weight}) for name, weight in weights.items()]
    assert_same({k: v for part in parts for k, v in part.items()}, whole)


def test_biases_are_permuted_with_their_rows() -> None:
    weight = torch.randn(64, 3)
    names = [f"model.layers.0.self_attn.q_proj.{leaf}" for leaf in ("weight", "bias")]
    converted = conversion()({names[0]: weight, names[1]: weight[:, 0]})
    prefix = "layers.0.attn.q_proj"
    assert torch.equal(converted[f"{prefix}.weight"][:, 0], converted[f"{prefix}.bias"])
    assert not torch.equal(converted[f"{prefix}.bias"], weight[:, 0])


def test_rows_stay_where_channels_turn_half_a_head_apart() -> None:
    weights = random_weights()
    name = "layers.1.attn.k_proj.weight"
    converted = conversion(turns_neighbours=False)(weights)
    assert torch.equal(converted[name], weights["model.layers.1.self_attn.k_proj.weight"])


def test_gemma2_has_its_norms_around_the_mlp() -> None:
    names = {
        "input_layernorm": "sa_norm",
        "post_attention_layernorm": "sa_scale",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_scale",
    }
    weights = {f"model.layers.0.{theirs}.weight": torch.randn(8) for theirs in names}
    expected = {
        f"layers.0.{ours}.scale": weights[f"model.layers.0.{theirs}.weight"]
        for theirs, ours in names.items()
    }
    assert_same(conversion(modules=GEMMA2_MODULES)(weights), expected)


def test_what_the_model_does_not_have_is_left_out() -> None:
    weights = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "model.norm.weight": torch.ones(2),
    }
    assert set(conversion()(weights)) == {"norm.scale"}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rope.weight",
        "model.layers.0.mlp.experts.3.up_proj.weight",
        "model.norm.scale",
        "norm.weight",
        "weight",
    ],
)
def test_an_unknown_weight_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"it has a weight {name}, which this architecture"):
        conversion()({name: torch.ones(2)})


@pytest.mark.parametrize(
    ("name", "rows", "wanted"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 60, 64),
        ("model.layers.0.self_attn.k_proj.bias", 64, 32),
        ("model.layers.0.self_attn.qkv_proj.weight", 64, 128),
    ],
)
def test_other_head_counts_are_named(name: str, rows: int, wanted: int) -> None:
    with pytest.raises(UserError, match=f"{name} has {rows} rows, and {wanted} by the head"):
        conversion()({name: torch.ones(rows)})
