"""The rotary embedding without a table is torchtune's and transformers' with one."""

import pytest
import torch
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings

from qst_tune.backbone.rotary import TablelessRotary


@pytest.mark.parametrize("given", [False, True])
def test_it_turns_as_the_table_does(given: bool) -> None:
    x = torch.randn(2, 11, 3, 16, generator=torch.Generator().manual_seed(0))
    where = {}
    if given:
        where["input_pos"] = torch.stack([torch.arange(11), torch.arange(50, 61)])
    expected = Qwen2RotaryPositionalEmbeddings(dim=16, max_seq_len=64, base=5000.0)(x, **where)
    torch.testing.assert_close(TablelessRotary(16, 5000.0)(x, **where), expected)


def test_a_far_position_takes_no_memory_and_stays_in_the_dtype() -> None:
    x = torch.randn(1, 1, 1, 4, dtype=torch.bfloat16)
    turned = TablelessRotary(4)(x, input_pos=torch.tensor([[10_000_000]]))
    assert turned.dtype == torch.bfloat16
    assert turned.isfinite().all()
