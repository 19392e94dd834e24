"""Side blocks cut out of backbone layers: which rows and columns, against the layers themselves."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchtune.models.qwen2 import qwen2
from torchtune.modules import RMSNorm

from qst_tune.models import qst_decoder
from qst_tune.models.rotary_decoder import rotary_decoder
from qst_tune.modules import side_init
from qst_tune.modules.base_quantization import weight_of
from qst_tune.modules.stretched_rope import StretchedRoPE
from tests.helpers import TINY, random_tokens, tiny_backbone
from tests.opt_models import hf_opt, our_opt

KINDS = ("slice", "prune")


def distinct_backbone(builder=tiny_backbone, **sizes):
    """A backbone in whose weights no number occurs twice."""
    backbone = builder(**sizes)
    with torch.no_grad():
        for parameter in backbone.parameters():
            sign = torch.randint(0, 2, parameter.shape) * 2 - 1
            place = torch.randperm(parameter.numel()).view(parameter.shape)
            parameter.copy_(sign * (place + 1) / parameter.numel())
    return backbone


def random_opt(**kind):
    """Biases everywhere, no gate in the MLP, no rotary embeddings."""
    return our_opt(hf_opt(**kind))


def random_post_norm_opt():
    return random_opt(post_norm=True)


def model_of(backbone, start, **settings):
    settings = {"reduction_factor": 4, "variant": "paper", "quantize_base": False, **settings}
    return qst_decoder(backbone, side_init=start, **settings)


def submatrix(small, large):
    """Rows and columns of ``large`` whose crossings are ``small``; every number occurs once."""
    position = {value: index for index, value in enumerate(large.flatten().tolist())}
    places = torch.tensor([[position[value] for value in row] for row in small.tolist()])
    rows, columns = places // large.shape[1], places % large.shape[1]
    assert (rows == rows[:, :1]).all()
    assert (columns == columns[:1]).all()
    return rows[:, 0].tolist(), columns[0].tolist()


def cuts_of(model, index=1):
    """Rows and columns of every linear of a block; vectors of every norm are checked here."""
    block, layer = model.side.blocks[index], model.layers[index]
    cuts = {
        name: submatrix(linear.weight, weight_of(layer.get_submodule(name), torch.float32))
        for name, linear in block.named_modules()
        if isinstance(linear, nn.Linear)
    }
    channels = cuts["mlp.w1"][1]
    for name in ("sa_norm", "mlp_norm"):
        assert torch.equal(getattr(block, name).scale, getattr(layer, name).scale[channels])
    assert torch.equal(model.side.norm.scale, model.norm.scale[channels])
    return cuts


@pytest.mark.parametrize("start", KINDS)
def test_every_weight_is_a_part_of_the_layers_and_they_fit_each_other(start):
    backbone = distinct_backbone()
    cuts = cuts_of(model_of(backbone, start))
    channels = cuts["attn.q_proj"][1]
    assert channels == sorted(set(channels))
    for name in ("attn.k_proj", "attn.v_proj", "mlp.w1", "mlp.w3"):
        assert cuts[name][1] == channels, name
    for name in ("attn.output_proj", "mlp.w2"):
        assert cuts[name][0] == channels, name
    assert cuts["mlp.w1"][0] == cuts["mlp.w3"][0] == cuts["mlp.w2"][1]
    # 6 heads of 4 instead of 16 channels, 3 key-value heads: each query head kept its own.
    values = torch.tensor(cuts["attn.v_proj"][0]).view(3, 4)
    written = torch.tensor(cuts["attn.output_proj"][1]).view(3, 2, 4)
    assert torch.equal(values // 16, torch.arange(3)[:, None].expand(3, 4))
    assert torch.equal(written // 16, torch.arange(6).view(3, 2, 1).expand(3, 2, 4))
    assert torch.equal(written % 16, (values % 16)[:, None].expand(3, 2, 4))


def test_slice_keeps_the_first_of_each():
    cuts = cuts_of(model_of(distinct_backbone(), "slice"))
    assert cuts["mlp.w1"] == (list(range(25)), list(range(24)))
    assert cuts["attn.v_proj"] == ([0, 1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35], list(range(24)))


def test_prune_keeps_what_is_large():
    """Channels, MLP channels, heads and value channels that were made large on purpose."""
    backbone = distinct_backbone()
    channels, inner = list(range(2, 96, 4)), list(range(3, 100, 4))
    with torch.no_grad():
        for layer in backbone.layers:
            layer.attn.output_proj.weight[channels] *= 9.123456
            layer.mlp.w2.weight[channels] *= 9.123456
            layer.mlp.w1.weight[inner] *= 4.567891
            layer.mlp.w3.weight[inner] *= 4.567891
            value = layer.attn.v_proj.weight.view(3, 16, 96)
            value[:, [1, 5, 6, 15]] *= 9.123456
            value[2] *= 3.141593
    assert cuts_of(model_of(backbone, "prune"))["mlp.w1"] == (inner, channels)
    assert cuts_of(model_of(backbone, "prune"))["attn.v_proj"][0] == [
        1, 5, 6, 15, 17, 21, 22, 31, 33, 37, 38, 47,
    ]  # fmt: skip
    fewer = model_of(backbone, "prune", min_head_dim=12)  # 2 heads of 12 and 1 kv head
    cuts = cuts_of(fewer)
    assert {row // 16 for row in cuts["attn.v_proj"][0]} == {2}
    assert {row // 16 for row in cuts["attn.q_proj"][0]} == {4, 5}
    assert {1, 5, 6, 15} <= {row % 16 for row in cuts["attn.v_proj"][0]}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "side_heads"),
    [(8, 2, (3, 1)), (6, 2, (3, 1)), (9, 3, (3, 1)), (12, 4, (3, 1))],
)
@pytest.mark.parametrize("start", KINDS)
def test_query_heads_keep_their_own_key_and_value_heads(start, heads, kv_heads, side_heads):
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "embed_dim": 12 * heads}
    model = model_of(distinct_backbone(**sizes), start, reduction_factor=heads)
    attn = model.side.blocks[0].attn
    assert (attn.num_heads, attn.num_kv_heads) == side_heads
    cuts = cuts_of(model)
    used = {row // 12 for row in cuts["attn.q_proj"][0]}
    (kv_head,) = {row // 12 for row in cuts["attn.v_proj"][0]}
    assert len(used) == 3
    assert {head // (heads // kv_heads) for head in used} == {kv_head}


def test_with_fewer_kv_heads_than_its_share_other_query_heads_join():
    """Of 4 heads over 4, 3 over 1: the best key-value head keeps its own, and two others join."""
    heads = torch.tensor([5.0, 1.0, 9.0, 7.0])
    chosen = side_init._choose_heads(
        SimpleNamespace(num_heads=3, num_kv_heads=1, head_dim=1),
        SimpleNamespace(num_heads=4, num_kv_heads=4),
        heads[:, None],
    )
    assert chosen.kv.tolist() == [2]
    assert chosen.query.tolist() == [0, 2, 3]
    assert chosen.kv_of_query.tolist() == [0, 0, 0]


# Of 12 query heads over 4 kv heads, 8 over 2 are kept: each kv head its own 3, and one more.
@pytest.mark.parametrize(
    ("start", "kv_heads", "groups"),
    [
        ("slice", [0, 1], [[0, 1, 2, 6], [3, 4, 5, 7]]),
        ("prune", [1, 3], [[0, 3, 4, 5], [1, 9, 10, 11]]),
    ],
)
@torch.no_grad()
def test_a_cut_attention_is_that_of_its_query_heads_each_with_its_own_kv_head(
    start, kv_heads, groups
):
    backbone = distinct_backbone(num_heads=12, num_kv_heads=4, embed_dim=192)
    for layer in backbone.layers:  # what is pruned: kv heads 1 and 3, beside them heads 0 and 1
        layer.attn.v_proj.weight.view(4, 16, 192)[[1, 3]] *= 91.23456
        layer.attn.output_proj.weight.view(192, 12, 16)[:, [0, 1]] *= 5.123456
    model = model_of(backbone, start, reduction_factor=3, min_head_dim=8)
    attn = model.side.blocks[1].attn
    assert (attn.num_heads, attn.num_kv_heads, attn.head_dim) == (8, 2, 8)
    x = torch.randn(2, 5, 64) / 10
    expected = attention_of_heads(model, kv_heads, groups, x)
    # fp32 sums in another order; outputs reach thousands.
    torch.testing.assert_close(attn(x, x), expected, rtol=1e-4, atol=1e-2)


def attention_of_heads(model, kv_heads, groups, x):
    """Literally, a sum over query heads, with rows and columns of the backbone's own weights."""
    attn, layer, cuts = model.side.blocks[1].attn, model.layers[1].attn, cuts_of(model)
    channels = cuts["attn.q_proj"][1]
    turned = torch.tensor(cuts["attn.k_proj"][0][:8]) % 16
    value_channels = torch.tensor(cuts["attn.v_proj"][0]).view(2, 8) % 16
    w_q, w_k, w_v = (m.weight[:, channels] for m in (layer.q_proj, layer.k_proj, layer.v_proj))
    w_o, future = layer.output_proj.weight[channels], torch.ones(5, 5).triu(1).bool()

    def rotated(linear, head):
        return attn.pos_embeddings((x @ linear[16 * head + turned].T)[:, :, None])[:, :, 0]

    out = torch.zeros_like(x)
    for kv, of_kv, group in zip(kv_heads, value_channels, groups, strict=True):
        for head in group:
            scores = rotated(w_q, head) @ rotated(w_k, kv).mT / 8**0.5
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            out += weights @ (x @ w_v[16 * kv + of_kv].T) @ w_o[:, 16 * head + of_kv].T
    return out


def partly_turning_backbone():
    """Of the 16 channels of a head the first 8 turn, as in Phi-4-mini."""
    return rotary_decoder(**TINY, head_dim=16, norm_eps=1e-5, rope=StretchedRoPE(8, 64))


@pytest.mark.parametrize("builder", [tiny_backbone, lambda: qwen2(**TINY), partly_turning_backbone])
def test_queries_and_keys_turn_with_the_position_as_in_the_backbone(builder):
    """Whichever way a family pairs its channels; both head_dims are 4 and 16 here."""
    model = model_of(distinct_backbone(builder), "prune")
    rows, _ = cuts_of(model)["attn.q_proj"]
    kept = rows[:4]
    assert rows == [head * 16 + row for head in range(6) for row in kept]
    assert cuts_of(model)["attn.k_proj"][0] == rows[:12]
    narrow = torch.randn(2, 20, 1, 4)
    wide = torch.zeros(2, 20, 1, 16)
    wide[..., kept] = narrow
    turned = model.layers[0].attn.pos_embeddings(wide)[..., kept]
    expected = model.side.blocks[0].attn.pos_embeddings(narrow)
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base_quantization", ["nf4", "fp4"])
def test_weights_are_those_that_the_backbone_computes_with(base_quantization):
    model = model_of(
        tiny_backbone(), "slice", quantize_base=True, base_quantization=base_quantization
    )
    decoded = model.layers[1].mlp.w2.weight.get_original_weight()
    assert torch.equal(model.side.blocks[1].mlp.w2.weight, decoded[:24, :25])


@pytest.mark.parametrize("base_quantization", ["nf4", "int4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_decoded_to_the_backbones_dtype(base_quantization, dtype):
    """Which integer weights do not show: their scales are fp32."""
    model = model_of(
        tiny_backbone(dtype=dtype), "slice", quantize_base=True, base_quantization=base_quantization
    )
    block, layer = model.side.blocks[1], model.layers[1]
    decoded = weight_of(layer.mlp.w2, dtype).float()
    assert torch.equal(block.mlp.w2.weight, decoded[:24, :25])
    decoded = weight_of(layer.attn.q_proj, dtype).float()
    assert torch.equal(block.attn.q_proj.weight[0], decoded[0, :24])


@pytest.mark.parametrize("start", KINDS)
def test_a_meta_model_gets_the_same_start_once_its_backbone_is_loaded(start):
    backbone = tiny_backbone()
    expected = model_of(backbone, start)
    with torch.device("meta"):
        model = model_of(tiny_backbone(), start)
    weights = {n: p for n, p in expected.named_parameters() if not n.startswith("side.")}
    model.load_state_dict(weights, strict=False, assign=True)
    model.initialize_side(torch.device("cpu"))
    for name, value in expected.side.state_dict().items():
        if name.startswith(("blocks.", "norm.")):
            assert torch.equal(model.side.state_dict()[name], value), name


@pytest.mark.parametrize("builder", [tiny_backbone, random_opt, random_post_norm_opt])
@pytest.mark.parametrize("start", KINDS)
def test_at_r_1_the_side_blocks_are_the_backbone(start, builder):
    """Nothing is cut then, and a side network fed with the embedding computes what it does."""
    model = model_of(builder(), start, reduction_factor=1, rank=4)
    h = g = model.tok_embeddings(random_tokens())
    for layer, block in zip(model.layers, model.side.blocks, strict=True):
        h, g = layer(h), block(g)
    torch.testing.assert_close(model.side.norm(g), model.norm(h), rtol=1e-5, atol=1e-5)


def test_biases_and_head_norms_are_cut_with_their_rows():
    backbone = distinct_backbone(lambda: qwen2(**TINY))
    for layer in backbone.layers:
        layer.attn.q_norm, layer.attn.k_norm = RMSNorm(16), RMSNorm(16)
        torch.nn.init.normal_(layer.attn.k_norm.scale)
    model = model_of(backbone, "prune")
    ours, theirs = model.side.blocks[1].attn, model.layers[1].attn
    cuts = cuts_of(model)
    for name in ("q_proj", "k_proj", "v_proj"):
        rows = cuts[f"attn.{name}"][0]
        assert torch.equal(getattr(ours, name).bias, getattr(theirs, name).bias[rows])
    assert torch.equal(ours.k_norm.scale, theirs.k_norm.scale[cuts["attn.k_proj"][0][:4]])
