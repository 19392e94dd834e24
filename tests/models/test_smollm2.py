"""SmolLM2's sizes, which torchtune lacks, against its published configurations."""

import pytest
import torch

from qst_tune import models


def build(name, **arguments):
    with torch.device("meta"):
        return getattr(models, name)(**arguments)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# layers, D, width inside the MLP, heads, kv heads, rope base, parameters
SIZES = {
    "smollm2_135m": (30, 576, 1536, 9, 3, 100_000, 134_515_008),
    "smollm2_360m": (32, 960, 2560, 15, 5, 100_000, 361_821_120),
    "smollm2_1_7b": (24, 2048, 8192, 32, 32, 130_000, 1_711_376_384),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_decoder_is_the_published_one(name):
    layers, dim, mlp_dim, heads, kv_heads, base, parameters = SIZES[name]
    model = build(name)
    kv_dim = dim // heads * kv_heads
    per_layer = 2 * dim * dim + 2 * dim * kv_dim + 3 * dim * mlp_dim + 2 * dim
    assert count(model) == parameters == layers * per_layer + 49_152 * dim + dim  # tied
    rope = model.layers[0].attn.pos_embeddings
    assert (rope.base, rope.max_seq_len, model.max_seq_len) == (base, 8192, 8192)
    assert model.norm.eps == model.layers[0].sa_norm.eps == 1e-5
    assert "output.weight" not in model.state_dict()


def test_rotary_embeddings_are_not_scaled():
    """llama3_2's default scale factor 32 is silently wrong for SmolLM2."""
    sizes = {"num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "embed_dim": 64}
    model = models.smollm2(**sizes, intermediate_dim=8, rope_base=100_000)
    rope = model.layers[0].attn.pos_embeddings
    angles = torch.outer(torch.arange(8192.0), 100_000.0 ** (-torch.arange(0, 64, 2) / 64))
    # fp32 angles of up to 8191 carry an error of 5e-4.
    torch.testing.assert_close(rope.cache[..., 0], angles.cos(), rtol=0, atol=2e-3)
    torch.testing.assert_close(rope.cache[..., 1], angles.sin(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", SIZES)
def test_the_side_network_has_the_parameters_of_the_formula(name):
    layers, dim, mlp_dim, heads, kv_heads, _, parameters = SIZES[name]
    h, rank = dim // 16, 16
    adapter = dim * rank + rank * h + 2 * h

    def block(h_kv):
        return 2 * h * h + 2 * h * h_kv + 3 * h * (mlp_dim // 16) + 2 * h

    expected = {
        # 32 or wider, heads are so few that each has its own keys and values.
        "default": 6 * (block(h) + 1) + 7 * adapter + h + h * dim + dim,
        "authors": layers * (block(h // heads * kv_heads) + h + adapter) + h + h * dim + dim + dim,
    }
    for variant, side_parameters in expected.items():
        model = build(f"qst_{name}", variant=variant)
        assert count(model.side) == side_parameters
        assert count(model) - count(model.side) == parameters
        assert all(parameter.is_meta for parameter in model.parameters())


def test_the_default_side_network_of_the_quickstarts_model():
    """A plain number, so that a change of default shows."""
    assert count(build("qst_smollm2_135m").side) == 184_146
