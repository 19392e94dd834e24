"""Angles of every scaling against transformers' functions, over thousands of positions."""

import math
from pathlib import Path

import pytest
import torch
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import RotaryPositionalEmbeddings
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qst_tune.models.hf.config import HFConfig
from qst_tune.models.hf.rope import can_turn_neighbours, halves_rope, neighbours_rope, read_rope
from qst_tune.modules.stretched_rope import StretchedRoPE

HEAD_DIM, POSITIONS = 64, 4096
ORIGINAL = "original_max_position_embeddings"
# As published: Llama 3.1 and 3.2, Qwen2.5, DeepSeek's YaRN, Phi-3.
SCALINGS = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192},
    "llama3 sharp": {"factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0, ORIGINAL: 999},
    "yarn": {"factor": 4.0, ORIGINAL: 32_768},
    "yarn mscale": {"factor": 40.0, ORIGINAL: 4096, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn untruncated": {"factor": 8.0, ORIGINAL: 4096, "beta_fast": 20, "truncate": False},
    "yarn attention": {"factor": 4.0, ORIGINAL: 4096, "attention_factor": 1.5},
    "longrope": {
        "short_factor": [1 + i / 10 for i in range(32)],
        "long_factor": [1 + i for i in range(32)],
        ORIGINAL: 4096,
    },
}


def config(**settings) -> HFConfig:
    return HFConfig(Path("folder"), {"max_position_embeddings": 131_072, **settings})


@pytest.mark.parametrize("name", SCALINGS)
def test_angles_and_attention_factor_are_those_of_transformers(name: str) -> None:
    kind = name.split()[0]
    parameters = {"rope_type": kind, "rope_theta": 500_000.0, **SCALINGS[name]}
    theirs = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        rope_parameters=parameters,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](theirs, seq_len=POSITIONS)
    angles = torch.arange(POSITIONS).float()[:, None] * frequencies
    expected = torch.stack([angles.cos(), angles.sin()]) * factor
    ours = halves_rope(read_rope(config(rope_parameters=parameters)), HEAD_DIM, POSITIONS)
    assert isinstance(ours, StretchedRoPE)
    # One ulp of a frequency is 2.4e-4 of a turn of the fastest at position 4096.
    torch.testing.assert_close(ours.cache, expected, rtol=0, atol=1e-3)


def test_torchtunes_llama3_has_the_same_angles() -> None:
    scaling = {"rope_type": "llama3", **SCALINGS["llama3"]}
    rope = read_rope(config(rope_theta=500_000.0, rope_scaling=scaling))
    assert can_turn_neighbours(rope)
    theirs, ours = neighbours_rope(rope, 64, POSITIONS), halves_rope(rope, 64, POSITIONS)
    assert isinstance(theirs, Llama3ScaledRoPE)
    torch.testing.assert_close(theirs.cache.permute(2, 0, 1), ours.cache, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "like_llama3", "kind"),
    [
        ({}, False, RotaryPositionalEmbeddings),
        ({}, True, Llama3ScaledRoPE),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, True, RotaryPositionalEmbeddings),
    ],
)
def test_unscaled_embeddings_are_torchtunes(settings, like_llama3: bool, kind) -> None:
    rope = read_rope(config(**settings))
    built = neighbours_rope(rope, 64, 10, like_llama3=like_llama3)
    assert type(built) is kind
    assert type(halves_rope(rope, 64, 10)) is Qwen2RotaryPositionalEmbeddings
    assert built.base == 10_000


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}},
        {"rope_theta": 9.0, "rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 7}},
    ],
)
def test_settings_are_found_where_any_transformers_writes_them(settings) -> None:
    rope = read_rope(config(**settings))
    assert (rope.kind, rope.base, rope.factor) == ("linear", 7.0, 2.0)


def test_the_first_names_of_longrope_are_known() -> None:
    scaling = {"type": "su", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    rope = read_rope(config(rope_scaling=scaling, original_max_position_embeddings=4096))
    assert (rope.kind, rope.longest, rope.factor) == ("longrope", 4096, 32.0)
    factor = halves_rope(rope, 64, 10).attention_factor
    assert factor == math.sqrt(1 + math.log(32) / math.log(4096))


def test_only_a_part_of_a_head_turns() -> None:
    rope = halves_rope(read_rope(config(partial_rotary_factor=0.25)), 64, 10)
    x = torch.randn(2, 10, 3, 64)
    changed = (rope(x) != x).any(dim=(0, 1)).any(dim=0)
    assert changed.tolist() == [True] * 16 + [False] * 48
