import torch
from torchtune.models.llama3_1 import llama3_1
from torchtune.modules import TransformerDecoder

from qst_tune.modules.meta_device import build_rotary_caches
from qst_tune.modules.torchtune_backbone import decoder_parts
from tests.support.numbers import TINY, random_tokens, tiny_backbone


def test_a_decoder_of_the_parts_is_the_same_modules_and_computes_the_same():
    backbone = tiny_backbone(tied=True)
    rebuilt = TransformerDecoder(**decoder_parts(backbone))
    assert dict(rebuilt.named_parameters()).keys() == dict(backbone.named_parameters()).keys()
    for name, parameter in rebuilt.named_parameters():
        assert parameter is backbone.get_parameter(name)
    tokens = random_tokens()
    assert torch.equal(rebuilt(tokens), backbone(tokens))


def test_caches_of_a_model_on_meta_become_those_of_one_that_was_built_with_memory():
    for builder in (tiny_backbone, lambda: llama3_1(**TINY)):
        with torch.device("meta"):
            model = builder()
        build_rotary_caches(model.layers, torch.device("cpu"))
        expected = dict(builder().named_buffers())
        assert expected.keys() == dict(model.named_buffers()).keys()
        assert all(torch.equal(b, expected[name]) for name, b in model.named_buffers())
        assert all(parameter.is_meta for parameter in model.parameters())
