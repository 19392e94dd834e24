import torch
from torchtune.models.llama3_1 import llama3_1

from qst_tune.modules.rotary_caches import build_rotary_caches
from tests.helpers import TINY, tiny_backbone


def test_caches_of_a_model_on_meta_become_those_of_one_that_was_built_with_memory():
    for builder in (tiny_backbone, lambda: llama3_1(**TINY)):
        with torch.device("meta"):
            model = builder()
        build_rotary_caches(model.layers, torch.device("cpu"))
        expected = dict(builder().named_buffers())
        assert expected.keys() == dict(model.named_buffers()).keys()
        assert all(torch.equal(b, expected[name]) for name, b in model.named_buffers())
        assert all(parameter.is_meta for parameter in model.parameters())
