"""A cache of transformers forgets its end, also when a pass was left in the middle."""

import pytest
import torch

from qst_tune.backbone.transformers import TransformersBackbone
from tests.support.model_types import tiny_model

TOKENS = torch.arange(3, 43)[None]


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_5_text"])
def test_a_pass_that_was_interrupted_leaves_no_trace(model_type: str) -> None:
    backbone = TransformersBackbone(tiny_model(model_type))
    expected = backbone.text_state(TOKENS)
    cache = backbone.new_cache()

    def stop(_: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with cache.attached():
        backbone.text_state(TOKENS[:, :20])
        with pytest.raises(KeyboardInterrupt):
            backbone.run(TOKENS[:, 20:30], taps=[2], visit=stop)
        kept = cache.cut(20, num_new=1)
        rest = backbone.text_state(TOKENS[:, kept:21])
    torch.testing.assert_close(rest[:, -1], expected[:, 20], rtol=0, atol=1e-5)


def test_a_window_does_not_keep_the_cache_from_going_back() -> None:
    """Windows of 16 tokens; a state along the row must begin again."""
    attention = TransformersBackbone(tiny_model("gemma3_text"))
    states = TransformersBackbone(tiny_model("qwen3_5_text"))
    for backbone, expected in ((attention, 20), (states, 0)):
        cache = backbone.new_cache()
        with cache.attached():
            backbone.text_state(TOKENS)
        assert cache.cut(20) == expected
