"""A batch that runs in parts gives what it gives as a whole."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from qst_tune.modules import nf4_linear, peqa_linear
from tests.support.numbers import (
    TINY,
    random_tokens,
)
from tests.support.side_networks import FP32, tiny_model


@pytest.mark.parametrize("chunk_tokens", [1, 7, 14, 20, 28])
@pytest.mark.parametrize("with_mask", [None, "per row", "shared"])
def test_a_batch_that_goes_through_the_backbone_in_parts_gives_the_same(with_mask, chunk_tokens):
    """Four rows of 7 tokens, 1 to 4 rows at a time."""
    model = tiny_model()
    tokens = random_tokens(batch=4, length=7)
    extra = {}
    if with_mask:
        rows = 4 if with_mask == "per row" else 1
        eye = torch.eye(7, dtype=torch.bool)
        extra["mask"] = (torch.rand(rows, 7, 7) < 0.5).tril() | eye
        extra["input_pos"] = torch.randint(0, TINY["max_seq_len"], (rows, 7))
    expected = model(tokens, **extra)
    sizes = []
    model.layers[1].register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    model.frozen_chunk_tokens = chunk_tokens
    torch.testing.assert_close(model(tokens, **extra), expected, **FP32)
    assert sum(sizes) == 4
    assert max(sizes) == max(1, chunk_tokens // 7)


@pytest.mark.parametrize(
    ("base_quantization", "module", "name"),
    [
        ("nf4", nf4_linear, "dequantize_nf4"),
        ("int8", peqa_linear, "centred_rows"),
        ("int4", peqa_linear, "dequantize_affine"),
    ],
)
@torch.no_grad()
def test_a_weight_is_decoded_once_for_all_parts_of_a_batch(
    base_quantization, module, name, monkeypatch
):
    model = tiny_model(base_quantization=base_quantization)
    model.side.disabled = True
    decode, decodings = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *args: decodings.append(name) or decode(*args))
    tokens, num_linears = random_tokens(batch=6, length=40), 7 * TINY["num_layers"]
    whole = model(tokens)
    assert len(decodings) == num_linears
    model.frozen_chunk_tokens = 80  # three parts
    torch.testing.assert_close(model(tokens), whole, **FP32)
    assert len(decodings) == 2 * num_linears


def test_positions_that_serve_all_rows_are_not_cut_where_there_are_as_many_rows():
    """``[T]``, of four tokens in four rows; two of which may share a position."""
    model = tiny_model()
    tokens, positions = random_tokens(batch=4, length=4), torch.tensor([0, 2, 2, 9])
    expected = model(tokens, input_pos=positions)
    model.frozen_chunk_tokens = 4
    torch.testing.assert_close(model(tokens, input_pos=positions), expected, **FP32)


def test_rows_under_a_block_mask_are_never_separated():
    """flex_attention would mask the second part of the batch like the first, without an error."""
    model = tiny_model()
    model.frozen_chunk_tokens = 128
    mask = create_block_mask(lambda b, h, i, j: i >= j, 4, None, 128, 128, device="cpu")
    sizes = []

    def layer(x, mask):
        sizes.append(len(x))
        return x

    model.backbone._frozen(layer, torch.zeros(4, 128, 8), mask=mask)
    model.backbone._frozen(layer, torch.zeros(4, 128, 8), mask=None)
    assert sizes == [4, 1, 1, 1, 1]
