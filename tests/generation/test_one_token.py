"""What modules compute for one token is what they compute for many, and nothing stays of it."""

import pytest
import torch
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.qwen2 import qwen2
from torchtune.modules import RMSNorm

from qst_tune.generation import caches as caches_module
from qst_tune.generation.caches import ModelCaches, last_logits
from qst_tune.generation.one_token import Substitute, substituted, substitutes
from qst_tune.models import qst_decoder
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.peqa_linear import PEQALinear
from tests.support.numbers import TINY, TINY_REDUCTION, random_tokens, randomize_, tiny_backbone

BF16 = torch.bfloat16
# Wide enough for whole vectors of torch's int8 kernel.
SIZES = {"intermediate_dim": 128}


def qst_model(dtype, **changes):
    torch.manual_seed(0)
    backbone = tiny_backbone(dtype=dtype, **SIZES)
    model = qst_decoder(backbone, reduction_factor=TINY_REDUCTION, **changes)
    randomize_(model.side)
    return model.eval()


@torch.no_grad()
def step_logits(model, tokens, monkeypatch, *, plain):
    """Logits of the last tokens one by one, behind a prompt of five."""
    with monkeypatch.context() as patch:
        if plain:
            patch.setattr(caches_module, "substitutes", lambda *args: [])
        caches, found = ModelCaches(model), []
        for start, stop in [(0, 5), *((n, n + 1) for n in range(5, tokens.shape[1]))]:
            is_real = torch.ones(len(tokens), stop, dtype=torch.bool)
            found.append(last_logits(model, caches, tokens[:, start:stop], is_real))
    return torch.stack(found)


@pytest.mark.parametrize("base_quantization", ["nf4", "int8", "int4", "none"])
@pytest.mark.parametrize("lora_layers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_logits_are_those_of_the_modules_themselves(
    base_quantization, lora_layers, dtype, monkeypatch
):
    model = qst_model(dtype, base_quantization=base_quantization, lora_layers=lora_layers)
    tokens = random_tokens(batch=3, length=12)
    before = [vars(module).get("forward") for module in model.modules()]
    expected = step_logits(model, tokens, monkeypatch, plain=True)
    found = step_logits(model, tokens, monkeypatch, plain=False)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0, "atol": 0.03}
    torch.testing.assert_close(found, expected, **close)  # of a standard deviation of 1
    assert [vars(module).get("forward") for module in model.modules()] == before


def test_biases_stay(monkeypatch):
    torch.manual_seed(0)
    model = qst_decoder(qwen2(**TINY), reduction_factor=TINY_REDUCTION, base_quantization="nf4")
    randomize_(model.side)
    for layer in model.layers:
        layer.attn.q_proj.bias.data.normal_()
    tokens = random_tokens(batch=2, length=9)
    expected = step_logits(model.eval(), tokens, monkeypatch, plain=True)
    found = step_logits(model, tokens, monkeypatch, plain=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def replaced(model, num_tokens=4):
    caches = ModelCaches(model)
    tokens = random_tokens(1, num_tokens)
    last_logits(model, caches, tokens, torch.ones_like(tokens, dtype=torch.bool))
    return {s.module: s.forward for s in substitutes(model, caches._decoded)}, caches


@pytest.mark.parametrize("base_quantization", ["nf4", "int8", "none"])
def test_every_layer_of_both_networks_is_replaced_as_a_whole(base_quantization):
    model = qst_model(BF16, base_quantization=base_quantization)
    found, _ = replaced(model)
    layers = [*model.layers, *model.side.blocks]
    assert {module for module in found if module in layers} == set(layers)
    parts = {part for layer in layers for part in layer.modules() if part is not layer}
    assert not parts & set(found)
    assert model.side.upsample in found


@pytest.mark.parametrize(
    ("base_quantization", "linear"), [("nf4", NF4Linear), ("int8", PEQALinear)]
)
def test_linears_that_lora_adds_to_are_replaced_one_by_one(base_quantization, linear):
    """LoRA adds to what a linear returns, by a hook on it."""
    model = qst_model(BF16, base_quantization=base_quantization, lora_layers=1)
    found, _ = replaced(model)
    linears = {module for module in model.layers.modules() if type(module) is linear}
    assert linears <= set(found)
    assert {layer.attn for layer in model.layers} <= set(found)
    assert not set(model.layers) & set(found)


def test_projections_side_by_side_take_no_more_memory_than_each_alone():
    model = qst_model(BF16)
    _, caches = replaced(model)
    kept = [weight for _, weight in caches._decoded.values()]
    assert len(kept) == 7 * TINY["num_layers"]
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in kept}
    assert len(storages) == 4 * TINY["num_layers"]  # q, k, v and gate, up are one each
    assert sum(s.nbytes() for s in storages.values()) == sum(w.nbytes for w in kept)


@torch.no_grad()
def test_a_position_that_is_written_anew_is_looked_up_anew():
    """As a recorded step does, in a tensor that stays."""
    rope = Llama3ScaledRoPE(8, max_seq_len=32)
    model = torch.nn.Module()
    model.tok_embeddings, model.rope = torch.nn.Embedding(2, 2), rope
    ((module, forward),) = substitutes(model, None)
    assert module is rope
    position, x = torch.tensor([[3], [0]]), torch.randn(2, 1, 5, 8)
    for _ in range(3):
        torch.testing.assert_close(
            forward(x, input_pos=position), rope(x, input_pos=position), rtol=1e-6, atol=1e-6
        )
        position.add_(4)


@torch.no_grad()
def test_a_norm_is_replaced_only_where_its_scale_keeps_its_value():
    model = torch.nn.Module()
    model.tok_embeddings = torch.nn.Embedding(2, 2, dtype=BF16)
    model.exact, model.finer = RMSNorm(32), RMSNorm(32)
    model.exact.scale.copy_(torch.rand(32).to(BF16))
    model.finer.scale.uniform_()
    ((module, forward),) = substitutes(model, None)
    assert module is model.exact
    x = torch.randn(3, 1, 32).to(BF16)
    assert torch.equal(forward(x), model.exact(x))


def test_modules_come_back_with_what_they_had():
    plain, own = torch.nn.Identity(), torch.nn.Identity()
    own.forward = before = lambda x: x + 1
    replaced = [Substitute(plain, torch.neg), Substitute(own, torch.neg)]
    with substituted(replaced):
        assert plain(torch.ones(())) == own(torch.ones(())) == -1
    with pytest.raises(KeyError), substituted(replaced):
        raise KeyError
    assert "forward" not in plain.__dict__
    assert own.forward is before
