"""Side blocks: their rotary embedding, and OPT's own layer and head.

tests/results/authors/test_checkpoint.py has the authors' tensors.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import TransformerSelfAttentionLayer

from qst_tune.backbone.side_blocks import PostNormLayer, TablelessRotary
from qst_tune.backbone.text_model import ProjectedHead
from qst_tune.generation.sequence import CachedSequence
from qst_tune.models import backbone_from_hf, qst_decoder, qst_from_hf
from tests.support.hf_models import loaded
from tests.support.numbers import losses_of_steps
from tests.support.opt_models import hf_opt, opt_backbone, padded_batch, randomize_opt_

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# 350M alone of the published sizes is narrow, and normalises behind its sums.
SHAPES: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "350M": {"post_norm": True, "token_dim": 20},
    "narrow": {"token_dim": 20},
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def model_over(shape: dict[str, Any], **settings: Any) -> Any:
    return qst_decoder(opt_backbone(**shape), reduction_factor=3, quantize_base=False, **settings)


@by_shape
@torch.no_grad()
def test_at_first_logits_are_transformers_padded_too(shape: dict[str, Any]) -> None:
    theirs = hf_opt(**shape)
    model = model_over(shape)
    model.frozen.model.load_state_dict(theirs.state_dict())
    tokens, real = padded_batch("left")
    expected = theirs(tokens, attention_mask=real.long()).logits
    torch.testing.assert_close(model(tokens, mask=real)[real], expected[real], **CLOSE)


def test_blocks_and_norm_are_those_of_the_size() -> None:
    plain, narrow = model_over({}), model_over(SHAPES["350M"])
    for block in (plain.side.blocks[0], narrow.side.blocks[0]):
        assert isinstance(block.mlp.activation, nn.ReLU)
        assert block.mlp.w3 is None
        assert block.attn.pos_embeddings is None
        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        assert len(linears) == 6
        assert all(linear.bias is not None for linear in linears)
    assert type(plain.side.blocks[0]) is TransformerSelfAttentionLayer
    assert type(narrow.side.blocks[0]) is PostNormLayer
    assert isinstance(plain.side.norm, nn.LayerNorm)
    assert isinstance(narrow.side.norm, nn.Identity)
    assert isinstance(narrow.output, ProjectedHead)


@torch.no_grad()
def test_a_post_norm_layer_is_transformers_own() -> None:
    from transformers.models.opt.modeling_opt import OPTDecoderLayer

    block = model_over(SHAPES["350M"], variant="authors").side.blocks[0]
    randomize_opt_(block)
    config = hf_opt(post_norm=True).config
    config.hidden_size, config.ffn_dim = 16, 33
    theirs = OPTDecoderLayer(config, layer_idx=0).eval()
    pairs = zip(_names(), theirs.state_dict().items(), strict=True)
    own = block.state_dict()
    theirs.load_state_dict({name: own[ours] for ours, (name, _) in pairs})
    x = torch.randn(2, 5, 16)
    mask = torch.zeros(1, 1, 5, 5).masked_fill(~torch.ones(5, 5).tril().bool(), -1e30)
    expected = theirs(x, attention_mask=mask)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(block(x), expected, **CLOSE)


def _names() -> list[str]:
    """Ours in the order of transformers' state dict."""
    modules = ("attn.k_proj", "attn.v_proj", "attn.q_proj", "attn.output_proj", "sa_norm")
    modules += ("mlp.w1", "mlp.w2", "mlp_norm")
    return [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]


def test_authors_number_of_heads_is_kept_where_they_are_odd() -> None:
    """As OPT-2.7B's 32 heads of 5 channels at r = 16; only rotary embeddings need pairs."""
    backbone = opt_backbone()
    shape = backbone.side_shape(2, 4)
    assert (shape.num_heads, shape.head_dim) == (4, 6)
    backbone.config.hidden_size = 40
    assert backbone.side_shape(2, 4).head_dim == 5


@by_shape
def test_training_lowers_the_loss_and_leaves_the_model_alone(shape: dict[str, Any]) -> None:
    model = model_over(shape).train()
    before = {name: p.clone() for name, p in model.frozen.named_parameters()}
    tokens, _ = padded_batch("right", (12, 12))

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    losses = losses_of_steps(loss, model.side.parameters(), lr=1e-2)
    assert losses[2] < losses[1] < losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.frozen.named_parameters())


@by_shape
@torch.no_grad()
def test_caches_give_what_whole_rows_give(shape: dict[str, Any]) -> None:
    model = model_over(shape).eval()
    randomize_opt_(model.side)
    tokens, _ = padded_batch("right", (14,))
    expected = model(tokens)[0]
    sequence = CachedSequence(model)
    for length in (6, 7, 14, 9):
        logits = sequence.next_logits(tokens[0, :length].tolist())
        torch.testing.assert_close(logits, expected[length - 1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_directory_as_meta_published_it_is_read(tmp_path: Path) -> None:
    """One .bin in fp16, names without "model.", the tied head beside the embedding."""
    theirs = hf_opt(post_norm=True, token_dim=20)
    theirs.config.save_pretrained(tmp_path)
    state = {n.removeprefix("model."): value.half() for n, value in theirs.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    tokens, _ = padded_batch("right", (9,))
    expected = theirs.half().float()(tokens).logits
    assert torch.equal(loaded(backbone_from_hf, tmp_path)(tokens), expected)
    model = loaded(qst_from_hf, tmp_path, reduction_factor=3)
    assert model.backbone.quantization == "nf4"


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
