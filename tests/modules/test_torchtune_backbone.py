import torch
from torchtune.modules import TransformerDecoder

from qst_tune.modules.torchtune_backbone import decoder_parts
from tests.support.numbers import random_tokens, tiny_backbone


def test_a_decoder_of_the_parts_is_the_same_modules_and_computes_the_same():
    backbone = tiny_backbone(tied=True)
    rebuilt = TransformerDecoder(**decoder_parts(backbone))
    assert dict(rebuilt.named_parameters()).keys() == dict(backbone.named_parameters()).keys()
    for name, parameter in rebuilt.named_parameters():
        assert parameter is backbone.get_parameter(name)
    tokens = random_tokens()
    assert torch.equal(rebuilt(tokens), backbone(tokens))
