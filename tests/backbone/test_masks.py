"""Unpacked rows are not searched for packed samples, and packed ones still are."""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch

from qst_tune.backbone.masks import rows_unpacked
from qst_tune.backbone.transformers import TransformersBackbone
from tests.support.model_types import tiny_model
from tests.support.numbers import random_tokens


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "opt", "qwen3_moe"])
def test_a_pass_over_unpacked_rows_waits_for_no_value(name: str) -> None:
    backbone = TransformersBackbone(tiny_model(name))
    tokens = random_tokens(batch=2, length=9, vocab_size=200)
    backbone.text_state(tokens)
    with ExitStack() as stack:
        for look in ("__bool__", "item", "tolist", "__int__", "nonzero"):
            refuse = mock.Mock(side_effect=AssertionError(f"{look} of a tensor"))
            stack.enter_context(mock.patch.object(torch.Tensor, look, refuse))
        backbone.text_state(tokens)


def test_packed_samples_are_still_found_by_their_positions() -> None:
    backbone = TransformersBackbone(tiny_model("llama"))
    tokens = random_tokens(batch=1, length=9, vocab_size=200)
    with rows_unpacked():
        pass
    alone = torch.cat([backbone.text_state(part) for part in tokens.split([5, 4], dim=1)], dim=1)
    input_pos = torch.cat([torch.arange(5), torch.arange(4)])[None]
    together = backbone.text_state(tokens, input_pos=input_pos)
    torch.testing.assert_close(together, alone, rtol=0.0, atol=1e-5)
