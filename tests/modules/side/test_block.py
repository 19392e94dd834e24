"""Side blocks have the sizes that were promised and are their backbone's own kind of layer."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torchtune.models.gemma import gemma
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.llama2 import llama2_7b, llama2_13b, llama2_70b
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.models.llama3_2 import llama3_2_1b, llama3_2_3b
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerSelfAttentionLayer

from qst_tune.models import smollm2_1_7b, smollm2_135m, smollm2_360m
from qst_tune.modules.side.block import (
    SideShape,
    build_side_blocks,
    layer_sizes,
    resize_norm,
    side_shape,
)
from tests.support.numbers import TINY, tiny_backbone


def on_meta(builder, **arguments):
    with torch.device("meta"):
        return builder(**arguments)


# Side width, width inside the MLP, heads, kv heads; by hand from the published configurations.
@pytest.mark.parametrize(
    ("builder", "reduction_factor", "expected"),
    [
        (llama2_7b, 16, (256, 688, 32, 32)),
        (llama2_13b, 16, (320, 864, 40, 40)),
        (llama2_70b, 16, (512, 1792, 64, 8)),
        (llama3_2_1b, 16, (128, 512, 32, 8)),
        (llama3_2_3b, 16, (192, 512, 24, 8)),
        (smollm2_135m, 16, (36, 96, 9, 3)),
        (smollm2_360m, 16, (60, 160, 15, 5)),
        (smollm2_1_7b, 16, (128, 512, 32, 32)),
        (smollm2_135m, 1, (576, 1536, 9, 3)),
        # head_dim would be below 4 or odd, so there are fewer heads:
        (llama3_2_1b, 32, (64, 256, 16, 4)),
        (smollm2_135m, 24, (24, 64, 6, 2)),
        (smollm2_135m, 8, (72, 192, 9, 3)),
        (smollm2_135m, 32, (18, 48, 3, 1)),
    ],
)
def test_sizes_for_real_models(builder, reduction_factor, expected):
    shape = side_shape(layer_sizes(on_meta(builder).layers[0]), reduction_factor)
    assert (shape.embed_dim, shape.hidden_dim, shape.num_heads, shape.num_kv_heads) == expected
    assert shape.head_dim * shape.num_heads == shape.embed_dim
    assert shape.head_dim >= 4
    assert shape.head_dim % 2 == 0


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("reduction_factor", [1, 2, 3, 4, 6, 8, 12, 24])
def test_query_heads_split_evenly_over_kv_heads_and_never_become_more(
    num_kv_heads, reduction_factor
):
    backbone = on_meta(tiny_backbone, num_heads=12, num_kv_heads=num_kv_heads)
    shape = side_shape(layer_sizes(backbone.layers[0]), reduction_factor)
    assert shape.num_heads % shape.num_kv_heads == 0
    assert shape.num_heads <= 12
    assert shape.num_kv_heads <= num_kv_heads
    if shape.num_heads == 12:
        assert shape.num_kv_heads == num_kv_heads
    on_meta(build_side_blocks, layers=backbone.layers, shape=shape)


@pytest.mark.parametrize("reduction_factor", [0, -1, 7, 97, 5])
def test_a_factor_that_does_not_fit_is_refused_with_factors_that_do(reduction_factor):
    layer = on_meta(tiny_backbone).layers[0]
    with pytest.raises(ValueError, match=f"reduction_factor={reduction_factor} gives") as error:
        side_shape(layer_sizes(layer), reduction_factor)
    listed = str(error.value).split("values that work: ")[1].split(", ")
    assert "4" in listed
    for factor in listed:
        assert side_shape(layer_sizes(layer), int(factor)).embed_dim == TINY["embed_dim"] // int(
            factor
        )


@pytest.mark.parametrize(("is_rotary", "width"), [(True, "an even width"), (False, "a width")])
def test_a_refused_factor_asks_for_even_heads_only_where_rotary_pairs_need_them(is_rotary, width):
    sizes = replace(layer_sizes(tiny_backbone().layers[0]), is_rotary=is_rotary)
    with pytest.raises(ValueError, match=f"into heads of {width} of at least 4"):
        side_shape(sizes, 48)


def test_a_backbone_too_narrow_for_any_factor_says_so():
    layer = on_meta(tiny_backbone, embed_dim=6, num_heads=1, num_kv_heads=1).layers[0]
    with pytest.raises(ValueError, match="none \\(the backbone is too narrow\\)"):
        side_shape(layer_sizes(layer), 2)


def test_a_very_wide_reduction_leaves_an_mlp():
    layer = on_meta(tiny_backbone, intermediate_dim=2).layers[0]
    assert side_shape(layer_sizes(layer), 8).hidden_dim == 1


def blocks_of(backbone, reduction_factor=4):
    shape = side_shape(layer_sizes(backbone.layers[0]), reduction_factor)
    return build_side_blocks(backbone.layers, shape), shape


def test_blocks_are_the_backbones_own_kind_of_layer():
    backbone = tiny_backbone(attn_dropout=0.1, norm_eps=1e-3)
    blocks, shape = blocks_of(backbone)
    assert len(blocks) == len(backbone.layers)
    for block, layer in zip(blocks, backbone.layers, strict=True):
        assert type(block) is TransformerSelfAttentionLayer
        ours, theirs = dict(block.named_modules()), dict(layer.named_modules())
        kinds = {name: type(module) for name, module in ours.items()}
        assert kinds == {name: type(module) for name, module in theirs.items()}
        shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
        assert shapes["attn.q_proj.weight"] == (24, 24)
        assert shapes["attn.k_proj.weight"] == shapes["attn.v_proj.weight"] == (12, 24)
        assert shapes["attn.output_proj.weight"] == (24, 24)
        assert shapes["mlp.w1.weight"] == shapes["mlp.w3.weight"] == (25, 24)
        assert shapes["mlp.w2.weight"] == (24, 25)
        assert block.sa_norm.eps == block.mlp_norm.eps == 1e-3
        assert block.attn.attn_dropout == 0.1
        assert block.attn.max_seq_len == TINY["max_seq_len"]
        assert (block.attn.num_heads, block.attn.num_kv_heads) == (6, 3)
        assert block.attn.head_dim == shape.head_dim == 4
        x = torch.randn(2, 5, 24)
        assert block(x).shape == x.shape


@pytest.mark.parametrize("tied", [True, False])
def test_no_module_or_parameter_is_shared_with_the_backbone(tied):
    backbone = tiny_backbone(tied=tied)
    blocks, _ = blocks_of(backbone)
    assert not set(blocks.modules()) & set(backbone.modules())
    assert not set(blocks.parameters()) & set(backbone.parameters())
    assert len(list(blocks.parameters())) == len(list(backbone.layers.parameters()))


def test_parameters_of_two_blocks_are_their_own():
    blocks, _ = blocks_of(tiny_backbone())
    weights = [block.attn.q_proj.weight for block in blocks]
    assert not torch.equal(weights[0], weights[1])


def test_rotary_embeddings_are_shared_as_in_the_backbone():
    backbone = tiny_backbone()
    assert backbone.layers[0].attn.pos_embeddings is backbone.layers[2].attn.pos_embeddings
    blocks, _ = blocks_of(backbone)
    assert len({block.attn.pos_embeddings for block in blocks}) == 1
    backbone.layers[2].attn.pos_embeddings = type(backbone.layers[0].attn.pos_embeddings)(
        16, max_seq_len=32, base=777
    )
    blocks, _ = blocks_of(backbone)
    ropes = [block.attn.pos_embeddings for block in blocks]
    assert ropes[0] is ropes[1]
    assert ropes[1] is not ropes[2]
    assert (ropes[2].base, ropes[2].max_seq_len, ropes[2].dim) == (777, 32, 4)


def test_rotary_base_and_scaling_are_the_backbones():
    """The cache is compared: an attribute that is copied but unused would not show in it."""
    backbone = llama3_1(**{**TINY, "max_seq_len": 48})
    for layer in backbone.layers:
        layer.attn.pos_embeddings = Llama3ScaledRoPE(
            16, max_seq_len=48, base=300_000, scale_factor=5, low_freq_factor=2,
            high_freq_factor=9, old_context_len=200,
        )  # fmt: skip
    blocks, _ = blocks_of(backbone)
    expected = Llama3ScaledRoPE(
        4, max_seq_len=48, base=300_000, scale_factor=5, low_freq_factor=2,
        high_freq_factor=9, old_context_len=200,
    )  # fmt: skip
    rope = blocks[0].attn.pos_embeddings
    assert type(rope) is Llama3ScaledRoPE
    assert torch.equal(rope.cache, expected.cache)
    assert not torch.equal(rope.cache, Llama3ScaledRoPE(4, max_seq_len=48, base=300_000).cache)


def test_biases_stand_where_the_backbone_has_them():
    backbone = qwen2(**TINY)
    blocks, _ = blocks_of(backbone)
    for block, layer in zip(blocks, backbone.layers, strict=True):
        biases = {name for name, _ in block.named_parameters() if name.endswith("bias")}
        assert biases == {f"attn.{part}.bias" for part in ("q_proj", "k_proj", "v_proj")}
        assert biases == {name for name, _ in layer.named_parameters() if name.endswith("bias")}


def test_another_familys_norm_and_activation_are_kept():
    backbone = gemma(**TINY, head_dim=32, norm_eps=1e-4)
    blocks, shape = blocks_of(backbone)
    block, layer = blocks[0], backbone.layers[0]
    assert type(block.sa_norm) is type(block.mlp_norm) is GemmaRMSNorm
    assert block.sa_norm.eps == 1e-4
    assert repr(block.mlp.activation) == repr(layer.mlp.activation)
    assert repr(block.mlp.activation) != "SiLU()"
    assert shape.head_dim == 4  # of the side network's width, whatever head_dim Gemma has
    x = torch.randn(1, 3, 24)
    assert block(x).shape == x.shape


def test_a_layer_of_another_type_is_refused():
    with pytest.raises(ValueError, match="of type Linear has no side block"):
        build_side_blocks([nn.Linear(2, 2)], SideShape(4, 4, 1, 1))


def test_resizing_a_norm_keeps_type_and_epsilon():
    resized = resize_norm(nn.LayerNorm(8, eps=0.25), 3)
    assert type(resized) is nn.LayerNorm
    assert (resized.normalized_shape, resized.eps) == ((3,), 0.25)
    identity = nn.Identity()
    assert type(resize_norm(identity, 3)) is nn.Identity
    assert resize_norm(identity, 3) is not identity
