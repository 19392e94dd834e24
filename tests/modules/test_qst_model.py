"""What the side network is given of a batch's mask."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from qst_tune.models import qst_decoder
from tests.support.numbers import random_tokens, tiny_backbone


def packed_mask(documents: torch.Tensor):
    """As torchtune makes it on CUDA: causal within each sample of a pack."""

    def within(b, h, q, k):
        return (q >= k) & (documents[b, q] == documents[b, k])

    batch, length = documents.shape
    return create_block_mask(within, batch, None, length, length, device="cpu")


@pytest.mark.parametrize(("min_head_dim", "is_dense"), [(4, True), (24, False)])
def test_a_mask_of_packed_rows_becomes_dense_for_heads_that_flex_attention_refuses(
    min_head_dim, is_dense
):
    model = qst_decoder(tiny_backbone(), reduction_factor=4, min_head_dim=min_head_dim)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 1, 1, 2, 2, 3, 3]])
    tokens = random_tokens(2, 8)
    mask = packed_mask(documents)
    given = model.side_where(tokens, mask=mask, input_pos=None)["mask"]
    assert (given is mask) != is_dense
    if is_dense:
        expected = (documents[:, :, None] == documents[:, None]).tril()
        assert torch.equal(given, expected)
