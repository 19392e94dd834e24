"""Caches that grow: what they give, and that a model with them computes what it did without."""

import pytest
import torch
from torchtune.modules import KVCache

from qst_tune.generation.caches import GrowingCache, attached, attentions, without_head
from qst_tune.models import qst_decoder
from tests.support.numbers import TINY, TINY_REDUCTION, random_tokens, randomize_, tiny_backbone


def tiny_model(**side_arguments):
    model = qst_decoder(tiny_backbone(), reduction_factor=TINY_REDUCTION, **side_arguments)
    randomize_(model.side)
    return model.eval()


def test_it_gives_what_torchtunes_cache_gives_as_far_as_that_is_filled() -> None:
    ours, theirs = GrowingCache(), KVCache(2, 40, 3, 4, torch.float32)
    length = 0
    for num_new in (5, 1, 1, 9, 1, 20):
        keys, values = torch.randn(2, 2, 3, num_new, 4).unbind()
        length += num_new
        for actual, expected in zip(
            ours.update(keys, values), theirs.update(keys, values), strict=True
        ):
            assert torch.equal(actual, expected[:, :, :length])


def test_a_cut_cache_goes_on_from_the_cut() -> None:
    keys = torch.arange(24.0).reshape(1, 2, 6, 2)
    cache = GrowingCache()
    cache.update(keys, -keys)
    cache.cut(9)  # nothing to cut
    assert cache.length == 6
    cache.cut(2)
    new = torch.full((1, 2, 1, 2), 99.0)
    for sign, held in zip((1, -1), cache.update(new, -new), strict=True):
        assert torch.equal(held, sign * torch.cat([keys[:, :, :2], new], dim=2))


def test_attentions_are_those_of_the_backbone_and_then_of_the_side_network() -> None:
    model = tiny_model(num_side_blocks=2)
    expected = [layer.attn for layer in [*model.layers, *model.side.blocks]]
    assert attentions(model) == expected
    assert len(expected) == TINY["num_layers"] + 2


@torch.no_grad()
def test_logits_in_pieces_equal_those_at_once() -> None:
    model, tokens = tiny_model(), random_tokens(batch=2, length=11)
    whole = model(tokens)
    caches = [GrowingCache() for _ in attentions(model)]
    pieces = []
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        positions = torch.arange(start, stop)
        mask = positions[:, None] >= torch.arange(stop)
        with attached(attentions(model), caches):
            new = tokens[:, start:stop]
            pieces.append(model(new, mask=mask[None], input_pos=positions[None]))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert not model.caches_are_setup()
    assert torch.equal(model(tokens), whole)  # nothing is left of them


def test_caches_and_head_come_back_after_an_error() -> None:
    model = tiny_model()
    caches = [GrowingCache() for _ in attentions(model)]
    with pytest.raises(RuntimeError), attached(attentions(model), caches), without_head(model):
        raise RuntimeError
    assert not model.caches_are_enabled()
    assert not model.skip_output_layer
