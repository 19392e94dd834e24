"""What a side network sees of a model of transformers."""

import gc
import weakref
from unittest.mock import patch

import pytest
import torch

from qst_tune.backbone.transformers import CHUNK_TOKENS, TransformersBackbone
from qst_tune.errors import UserError
from qst_tune.models import qst_decoder
from qst_tune.modules.side.per_row import share_backbone
from tests.support.model_types import tiny_model
from tests.support.numbers import randomize_

TOKENS = torch.arange(3, 27).view(2, 12)


def test_states_are_transformers_hidden_states_in_order() -> None:
    theirs = tiny_model("smollm3")
    backbone = TransformersBackbone(theirs)
    seen: list[torch.Tensor] = []
    f = backbone.run(TOKENS, taps=[0, 2, 4], visit=seen.append)
    assert not any(layer._forward_hooks for layer in backbone.layers)
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS, output_hidden_states=True).hidden_states
    for state, index in zip(seen[:2], (0, 2), strict=True):
        assert torch.equal(state, expected[index])
    assert torch.equal(f, expected[4])  # transformers' last one is behind the final norm
    assert torch.equal(backbone.embed(TOKENS), expected[0])


def test_hidden_states_never_lie_in_memory_together() -> None:
    backbone = TransformersBackbone(tiny_model("smollm3"))
    alive: list[weakref.ref[torch.Tensor]] = []

    def visit(state: torch.Tensor) -> None:
        gc.collect()
        # A layer still has its input, and the model's forward the embedding.
        assert sum(ref() is not None for ref in alive[1:]) <= 1
        alive.append(weakref.ref(state))

    backbone.run(TOKENS, taps=range(5), visit=visit)
    assert len(alive) == 5


def test_the_side_network_gets_gradients_and_the_backbone_none() -> None:
    model = qst_decoder(TransformersBackbone(tiny_model("smollm3")), reduction_factor=4)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(TOKENS)
    frozen = {p.data_ptr() for p in model.frozen.model.model.layers.parameters()}
    assert not frozen & {t.data_ptr() for t in saved}
    y.square().mean().backward()
    assert all(p.grad is None for p in model.frozen.parameters())
    assert any(p.grad.abs().sum() > 0 for p in model.side.parameters() if p.grad is not None)


def test_a_large_batch_in_parts_gives_the_same_logits_and_gradients() -> None:
    model = qst_decoder(TransformersBackbone(tiny_model("smollm3")), reduction_factor=4)
    torch.nn.init.normal_(model.side.upsample.weight)
    tokens = torch.arange(3, 63).view(5, 12)
    results = []
    for chunk in (4096, 24):
        model.frozen.chunk_tokens = chunk
        model.zero_grad()
        logits = model(tokens)
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.side.parameters())])
    assert len(model.backbone.row_parts(tokens, None)) == 3
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole)


def test_what_is_no_decoder_is_refused() -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, intermediate_size=16, vocab_size=20))
    with pytest.raises(UserError, match=r"model_type='bert'.*not supported"):
        TransformersBackbone(model)


@torch.no_grad()
def test_rows_with_side_networks_of_their_own_give_what_they_give_alone() -> None:
    """Of a batch that would run in parts, padded on the left."""
    tokens, padding = torch.randint(3, 250, (3, 20)), torch.ones(3, 20, dtype=torch.bool)
    padding[1, :7] = False
    models, expected = {}, []
    for name, row in (("a", slice(0, 1)), ("b", slice(1, 2))):
        backbone = TransformersBackbone(tiny_model("gemma3_text"))
        models[name] = qst_decoder(backbone, reduction_factor=4, num_side_blocks=2).eval()
        randomize_(models[name].side)
        expected.append(models[name](tokens[row], mask=padding[row]))
    shared = models["a"]
    shared.side.disabled = True
    expected.append(shared(tokens[2:]))
    shared.side.disabled = False
    shared.backbone.chunk_tokens = 20
    share_backbone(shared, {name: model.side for name, model in models.items()})
    shared.side.use(["a", "b", None])
    together = shared(tokens, mask=padding)
    for row, alone in enumerate(expected):
        real = padding[row]
        torch.testing.assert_close(together[row, real], alone[0, real], rtol=0, atol=1e-5)


def test_a_model_whose_layers_have_different_heads_starts_as_it_is() -> None:
    """Gemma 4's larger models: full attention has fewer key-value heads, and no values."""
    settings = {"num_global_key_value_heads": 1, "attention_k_eq_v": True}
    theirs = tiny_model(
        "gemma4_text", **settings, layer_types=["sliding_attention", "full_attention"] * 2
    )
    model = qst_decoder(TransformersBackbone(theirs), reduction_factor=4, base_quantization="none")
    assert model.side.blocks[0].attn.num_kv_heads == 1  # of two, at a quarter of the width
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits)


def test_a_gpu_takes_more_tokens_at_once_and_an_estimate_for_it_too() -> None:
    backbone = TransformersBackbone(tiny_model("smollm3"))
    tokens = torch.zeros(20, 1024, dtype=torch.int64, device="meta")
    assert [part.stop for part in backbone.row_parts(tokens, None)] == [4, 8, 12, 16, 20]
    with patch.dict(CHUNK_TOKENS, cpu=CHUNK_TOKENS["cuda"]):
        assert [part.stop for part in backbone.row_parts(tokens, None)] == [8, 16, 24]
