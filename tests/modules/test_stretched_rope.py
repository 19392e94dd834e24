"""The rotation against a literal one, and what the side network makes of it."""

import pytest
import torch

from qst_tune.modules.side_block import _side_rope
from qst_tune.modules.stretched_rope import StretchedRoPE

DIVISORS = [1.0, 2.5, 7.0]


def literal(x, positions, *, dim, base, divisors, factor):
    """``rotate_half`` of transformers' modeling_llama.py, in float64, of the first ``dim``."""
    theta = base ** (-torch.arange(0, dim, 2).double() / dim) / torch.tensor(divisors).double()
    angle = positions.double()[..., None] * theta
    angle = torch.cat([angle, angle], dim=-1).unsqueeze(-2)
    turned, still = x.double()[..., :dim], x.double()[..., dim:]
    half = torch.cat([-turned[..., dim // 2 :], turned[..., : dim // 2]], dim=-1)
    turned = (turned * angle.cos() + half * angle.sin()) * factor
    return torch.cat([turned, still], dim=-1)


@pytest.mark.parametrize("head_dim", [6, 10])
@pytest.mark.parametrize(
    "input_pos", [None, torch.tensor([[0, 5, 2, 2], [9, 1, 0, 3]]), torch.tensor([4, 5, 6, 7])]
)
def test_heads_are_turned_by_their_positions(head_dim: int, input_pos) -> None:
    rope = StretchedRoPE(6, 10, 100.0, divisors=DIVISORS, attention_factor=1.3)
    x = torch.randn(2, 4, 3, head_dim)
    positions = torch.arange(4) if input_pos is None else input_pos
    expected = literal(x, positions, dim=6, base=100.0, divisors=DIVISORS, factor=1.3)
    torch.testing.assert_close(rope(x, input_pos=input_pos).double(), expected, rtol=0, atol=1e-5)


def test_one_position_for_each_row_as_behind_a_cache() -> None:
    rope = StretchedRoPE(4, 10)
    x = torch.randn(3, 1, 2, 4)
    positions = torch.tensor([1, 7, 4])
    assert torch.equal(rope(x, input_pos=positions), rope(x, input_pos=positions[:, None]))


def test_bf16_stays_bf16_and_the_cache_fp32() -> None:
    rope = StretchedRoPE(4, 10)
    assert rope(torch.randn(1, 2, 1, 4).bfloat16()).dtype == torch.bfloat16
    assert rope.cache.dtype == torch.float32


def test_it_is_built_on_meta_and_filled_by_rope_init() -> None:
    with torch.device("meta"):
        rope = StretchedRoPE(6, 10, divisors=DIVISORS)
    assert rope.cache.is_meta
    rope.rope_init()
    assert torch.equal(rope.cache, StretchedRoPE(6, 10, divisors=DIVISORS).cache)


def test_the_side_network_turns_as_fast_but_is_not_stretched() -> None:
    """It has other heads, for which the factors are not made, and nothing learnt at a length."""
    rope = _side_rope(StretchedRoPE(6, 10, 77.0, divisors=DIVISORS, attention_factor=2.0), 4)
    assert torch.equal(rope.cache, StretchedRoPE(4, 10, 77.0).cache)
