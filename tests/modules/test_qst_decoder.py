"""The QST model against torchtune's own decoder and against the literal equations."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtune import training
from torchtune.generation import (
    generate,
    get_causal_mask_from_padding_mask,
    get_position_ids_from_padding_mask,
)
from torchtune.models.gemma import gemma
from torchtune.modules import KVCache, TransformerDecoder
from torchtune.modules.attention_utils import create_block_causal_mask
from torchtune.modules.common_utils import delete_kv_caches
from torchtune.modules.peft import disable_adapter, get_adapter_params

from qst_tune.models import qst_decoder
from qst_tune.modules.backbone_formats import quantize_linears
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.qst_decoder import QSTDecoder
from tests.reference import qst_reference as reference
from tests.support.numbers import (
    TINY,
    TINY_REDUCTION,
    random_tokens,
    reference_backbone,
    reference_choices,
    reference_shape,
    reference_side,
    tiny_backbone,
)
from tests.support.side_networks import FP32, kept_bytes, next_token_loss, our_gradients, tiny_model

VARIANTS = ("default", "paper", "authors")


def plain_logits(model, tokens, **kwargs):
    """What torchtune's own forward computes over the same (quantised) modules."""
    return TransformerDecoder.forward(model, tokens, **kwargs)


def run_reference(model, tokens, *, dtype=torch.float32, side=None, **kwargs):
    if side is None:
        side = reference_side(model.side, model.side.state_dict())
        side = {name: weight.detach() for name, weight in side.items()}
    return reference.forward(
        reference_backbone(model, dtype),
        {name: weight.to(dtype) for name, weight in side.items()},
        tokens,
        reference_shape(model.layers),
        reference_shape(model.side.blocks),
        choices=reference_choices(model),
        **kwargs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["default", "paper"])
def test_a_new_model_equals_the_quantised_backbone_bit_for_bit(variant, dtype):
    backbone = tiny_backbone(dtype=dtype)
    quantised = copy.deepcopy(backbone)
    quantize_linears(quantised.layers)
    model = qst_decoder(backbone, reduction_factor=TINY_REDUCTION, variant=variant)
    tokens = random_tokens()
    expected = quantised(tokens)
    assert expected.dtype == torch.float32
    assert torch.equal(model(tokens), expected)
    assert not torch.equal(expected, tiny_backbone(dtype=dtype)(tokens))


def test_the_authors_variant_does_not_start_at_the_backbone():
    model = tiny_model(variant="authors", random=False)
    tokens = random_tokens()
    assert (model(tokens) - plain_logits(model, tokens)).abs().max() > 0.05


def record_hidden_states(model):
    """Tensors under the reference's names, caught while the model runs."""
    seen = {}

    def keep(module, name, pick=lambda args, out: out):
        module.register_forward_hook(
            lambda _, args, out: seen.__setitem__(name, pick(args, out).detach())
        )

    keep(model.tok_embeddings, "backbone_hidden.0")
    for i, layer in enumerate(model.layers):
        keep(layer, f"backbone_hidden.{i + 1}")
    for i, block in enumerate(model.side.blocks):
        keep(block, f"side_gated.{i}", lambda args, out: args[0])
        keep(block, f"side_hidden.{i + 1}")
    keep(model.norm, "backbone_last")
    keep(model.side.norm, "side_last")
    keep(model.side.upsample, "upsampled")
    keep(model.side.output_mix, "mixed")
    return seen


@pytest.mark.parametrize("quantize_base", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_equals_the_literal_equations(variant, tied, quantize_base):
    model = tiny_model(variant=variant, tied=tied, quantize_base=quantize_base)
    seen = record_hidden_states(model)
    tokens = random_tokens(batch=3, length=13)
    seen["logits"] = model(tokens)
    expected = run_reference(model, tokens)
    expected.pop("side_hidden.0")  # g_0 leaves no module of its own; side_gated.0 depends on it
    assert set(seen) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(seen[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **FP32)


@pytest.mark.parametrize(
    ("sizes", "reduction_factor"),
    [
        ({"num_heads": 8, "num_kv_heads": 2}, 8),  # heads shrink from 8 to 3: kv heads to 1
        # 84 / 5 is no whole number; width 16 takes 2 heads, not 3
        ({"embed_dim": 84, "num_heads": 3, "num_kv_heads": 1, "num_layers": 1}, 5),
        ({"embed_dim": 40, "num_heads": 4, "num_kv_heads": 4}, 1),
    ],
)
def test_odd_sizes_equal_the_literal_equations(sizes, reduction_factor):
    model = tiny_model(sizes=sizes, reduction_factor=reduction_factor)
    tokens = random_tokens(batch=1, length=1)
    expected = run_reference(model, tokens)["logits"]
    torch.testing.assert_close(model(tokens), expected, **FP32)
    tokens = random_tokens(batch=2, length=7)
    torch.testing.assert_close(model(tokens), run_reference(model, tokens)["logits"], **FP32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_logits_are_as_near_to_the_exact_ones_as_bfloat16_allows(variant):
    """Judged by the literal equations: in fp32 they are the truth, in bf16 the yardstick."""
    model = tiny_model(variant=variant, dtype=torch.bfloat16)
    tokens = random_tokens(batch=3, length=13)
    logits = model(tokens)
    assert logits.dtype == torch.float32
    exact = run_reference(model, tokens)["logits"]
    yardstick = run_reference(model, tokens, dtype=torch.bfloat16)["logits"].float() - exact
    difference = logits - exact
    # Measured over 8 seeds: 0.013 of the logits in norm, at most 1.06 yardsticks; 0.056 at most.
    assert difference.norm() < 1.25 * yardstick.norm()
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.1)


def reference_gradients(model, tokens, dtype=torch.float32):
    """Of the literal equations, computed in ``dtype`` over fp32 leaves; under our names."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.side.named_parameters()}
    renamed = reference_side(model.side, {**model.side.state_dict(), **leaves})
    out = run_reference(model, tokens, dtype=dtype, side=renamed)
    next_token_loss(out["logits"].float(), tokens).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gradient_equals_that_of_the_literal_equations(variant):
    model = tiny_model(variant=variant)
    tokens = random_tokens(batch=2, length=9)
    ours, expected = our_gradients(model, tokens), reference_gradients(model, tokens)
    assert set(ours) == set(expected)
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        # Measured over 8 seeds: 4.6e-7 at most.
        torch.testing.assert_close(
            ours[name], grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_gradients_are_fp32_and_as_near_to_the_exact_ones_as_bfloat16_allows(variant):
    model = tiny_model(variant=variant, dtype=torch.bfloat16)
    tokens = random_tokens(batch=4, length=16)
    ours, exact = our_gradients(model, tokens), reference_gradients(model, tokens)
    yardstick = reference_gradients(model, tokens, dtype=torch.bfloat16)
    assert {grad.dtype for grad in ours.values()} == {torch.float32}
    # Measured over 8 seeds: all together 0.04 to 0.13 of the gradient, as the literal equations in
    # bf16; one tensor 0.24. A scalar gate may cancel to nothing, so those count together only.
    error, allowed, size = (
        torch.cat([grad.flatten() for grad in grads]).norm()
        for grads in (
            [ours[name] - exact[name] for name in exact],
            [yardstick[name] - exact[name] for name in exact],
            exact.values(),
        )
    )
    assert error < 2 * allowed
    assert error < 0.2 * size
    for name, grad in exact.items():
        assert grad.numel() == 1 or (ours[name] - grad).norm() < 0.4 * grad.norm(), name


# Each choice that no preset makes, over the preset where it does most.
CHOICES = [
    {"downsample": "linear"},
    {"downsample": "lora"},
    {"downsample": "maxpool"},
    {"downsample": "avgpool"},
    {"activation": "relu"},
    {"activation": "gelu"},
    {"activation": "identity"},
    {"mix_per_channel": False},
    {"output_mix": "alpha"},  # one alpha a channel
    {"gate_per_channel": False, "downsample_norm": False},
    {"normalize_hidden": True},
    {"num_side_blocks": 1},
    {"num_side_blocks": 2, "share_first_downsample": False},
]
choices = pytest.mark.parametrize("choice", CHOICES, ids=str)


def padded_batch():
    """Rows padded on the left, on the right and not at all; tokens and keyword arguments."""
    is_token = torch.ones(3, 9, dtype=torch.bool)
    is_token[0, :4] = is_token[1, 6:] = False
    tokens = random_tokens(batch=3, length=9) * is_token
    mask = get_causal_mask_from_padding_mask(is_token)
    return tokens, {"mask": mask, "input_pos": get_position_ids_from_padding_mask(is_token)}


@choices
def test_every_tensor_and_gradient_of_every_choice_equals_the_literal_equations(choice):
    model = tiny_model(variant="authors", **choice)
    tokens, where = padded_batch()
    seen = record_hidden_states(model)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.side.named_parameters()}
    expected = run_reference(
        model,
        tokens,
        side=reference_side(model.side, {**model.side.state_dict(), **leaves}),
        mask=where["mask"],
        positions=where["input_pos"],
    )
    seen["logits"] = model(tokens, **where)
    for logits in (seen["logits"], expected["logits"]):
        next_token_loss(logits, tokens).backward()
    for name, tensor in seen.items():
        torch.testing.assert_close(
            tensor, expected[name], msg=lambda m, n=name: f"{n}: {m}", **FP32
        )
    # Measured over 8 seeds: gradients differ by 3.0e-7 at most.
    for name, leaf in leaves.items():
        grad = model.side.get_parameter(name).grad
        torch.testing.assert_close(
            grad, leaf.grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@choices
def test_every_choice_in_bfloat16_is_as_near_to_the_exact_one_as_bfloat16_allows(choice):
    """As for the presets above.

    Measured over 8 seeds: 0.9 yardsticks in the median, 1.2 at most; 1.6 where 5 relus leave a norm
    next to nothing to enlarge.
    """
    model = tiny_model(variant="authors", dtype=torch.bfloat16, **choice)
    tokens, where = padded_batch()
    there = {"mask": where["mask"], "positions": where["input_pos"]}
    exact = run_reference(model, tokens, **there)["logits"]
    yardstick = run_reference(model, tokens, dtype=torch.bfloat16, **there)["logits"].float()
    difference = model(tokens, **where) - exact
    assert difference.norm() < 1.25 * (yardstick - exact).norm()


def test_only_the_side_network_gets_gradients():
    model = tiny_model()
    next_token_loss(model(tokens := random_tokens()), tokens).backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    side = {name for name, _ in model.named_parameters() if name.startswith("side.")}
    assert with_grad == trainable == side
    assert set(get_adapter_params(model)) == side


def test_no_gradient_enters_a_backbone_even_if_someone_unfreezes_it():
    model = tiny_model(quantize_base=False).requires_grad_(True)
    next_token_loss(model(tokens := random_tokens()), tokens).backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name in with_grad if not name.startswith("side.")} == {"output.weight"}


def gemma_backbone(**sizes):
    """Gemma's heads need not fill D, so that the width of the attention can grow by itself."""
    return gemma(**{**TINY, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16, **sizes})


@pytest.mark.parametrize(
    "wider", [{"intermediate_dim": 1024}, {"head_dim": 128}, {"num_kv_heads": 4, "head_dim": 64}]
)
def test_memory_for_backward_does_not_grow_with_the_backbone(wider):
    """One side network over two backbones of the same width D."""
    tokens = random_tokens(length=32)
    narrow, wide = gemma_backbone(), gemma_backbone(**wider)
    side = qst_decoder(gemma_backbone(), reduction_factor=TINY_REDUCTION).side
    dense_narrow, dense_wide = (kept_bytes(lambda b=b: b(tokens)) for b in (narrow, wide))
    assert dense_wide > 1.3 * dense_narrow  # the meter sees what an ordinary backbone keeps
    quantize_linears(narrow.layers)
    quantize_linears(wide.layers)
    qst_narrow = kept_bytes(lambda: QSTDecoder(narrow, side)(tokens))
    qst_wide = kept_bytes(lambda: QSTDecoder(wide, side)(tokens))
    assert qst_narrow == qst_wide


def test_a_pooling_downsampler_keeps_no_hidden_state():
    """Of the N + 1 hidden states, an adapter keeps each, average pooling none."""
    tokens = random_tokens(batch=2, length=32)
    hidden_state = 2 * 32 * TINY["embed_dim"] * 4
    kept = {
        kind: kept_bytes(lambda k=kind: tiny_model(downsample=k, rank=1)(tokens))
        for kind in ("avgpool", "lora")
    }
    saved = kept["lora"] - kept["avgpool"]
    assert saved > (TINY["num_layers"] + 1) * hidden_state


@pytest.mark.parametrize("changed", [0, 4, 10])
def test_a_token_leaves_the_logits_before_it_unchanged(changed):
    model = tiny_model()
    tokens = random_tokens(length=11)
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % TINY["vocab_size"]
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


def test_the_side_network_alone_carries_information_only_forward():
    """With blank backbone layers, any influence between tokens goes through the side blocks."""
    model = tiny_model(quantize_base=False)
    with torch.no_grad():
        for layer in model.layers:
            layer.attn.output_proj.weight.zero_()
    tokens = random_tokens(length=11)
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % TINY["vocab_size"]
    differs = (model(tokens) != model(other)).any(-1)
    assert not differs[:, :5].any()
    assert differs[:, 5:].all()


@pytest.mark.parametrize("recompute", [True, False])
def test_dropout_acts_on_what_the_side_network_reads_in_training_and_nowhere_else(recompute):
    """The authors' code drops nothing in the adapter, and in OPT drops in the frozen backbone."""
    plain, model = tiny_model(), tiny_model(dropout=0.5)
    model.side.load_state_dict(plain.side.state_dict())
    model.load_state_dict(plain.state_dict())
    model.side.recompute = recompute
    tokens = random_tokens()
    hidden = record_hidden_states(plain)
    seen = record_hidden_states(model)
    assert not torch.equal(model(tokens), plain(tokens))
    for name in [n for n in hidden if n.startswith("backbone")]:
        assert torch.equal(seen[name], hidden[name]), name
    assert not torch.equal(seen["side_hidden.1"], hidden["side_hidden.1"])
    model.eval()
    assert torch.equal(model(tokens), plain(tokens))


@pytest.mark.parametrize("side_is_left", [True, False])
@pytest.mark.parametrize("disabled", [True, False])
def test_padded_rows_equal_unpadded_ones(disabled, side_is_left):
    model = tiny_model()
    model.side.disabled = disabled
    sequences = [torch.randint(1, TINY["vocab_size"], (n,)) for n in (9, 5, 1)]
    longest = max(map(len, sequences))
    rows = [
        F.pad(s, (longest - len(s), 0) if side_is_left else (0, longest - len(s)))
        for s in sequences
    ]
    tokens = torch.stack(rows)
    is_token = tokens != 0
    mask = get_causal_mask_from_padding_mask(is_token)
    logits = model(tokens, mask=mask, input_pos=get_position_ids_from_padding_mask(is_token))
    for row, kept, sequence in zip(logits, is_token, sequences, strict=True):
        torch.testing.assert_close(row[kept], model(sequence[None])[0], **FP32)


def test_padding_without_any_attention_leaves_finite_gradients():
    """A row that may attend to nothing must not turn the loss of others into NaN."""
    model = tiny_model()
    tokens = random_tokens(batch=2, length=6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril().repeat(2, 1, 1)
    mask[1, :2] = False
    mask[1, :, :2] = False
    logits = model(tokens, mask=mask)
    logits[:, 2:].logsumexp(-1).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.side.parameters())


def test_packed_sequences_equal_separate_ones():
    model = tiny_model()
    lengths = [4, 1, 6]
    sequences = [torch.randint(1, TINY["vocab_size"], (n,)) for n in lengths]
    packed = torch.cat(sequences)[None]
    mask = create_block_causal_mask([torch.tensor(lengths)])
    input_pos = torch.cat([torch.arange(n) for n in lengths])[None]
    logits = model(packed, mask=mask, input_pos=input_pos)[0]
    separate = torch.cat([model(s[None])[0] for s in sequences])
    torch.testing.assert_close(logits, separate, **FP32)
    unmasked = model(packed)[0]
    assert (unmasked - separate).abs().max() > 0.05


def test_a_mask_and_positions_equal_the_literal_equations():
    model = tiny_model()
    tokens = random_tokens(batch=2, length=8)
    mask = torch.rand(2, 8, 8) < 0.5
    mask |= torch.eye(8, dtype=torch.bool)
    mask &= reference.causal_mask(2, 8)
    positions = torch.randint(0, TINY["max_seq_len"], (2, 8))
    expected = run_reference(model, tokens, mask=mask, positions=positions)["logits"]
    torch.testing.assert_close(model(tokens, mask=mask, input_pos=positions), expected, **FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_disabled_side_network_gives_the_plain_backbone(dtype):
    model = tiny_model(dtype=dtype)
    tokens = random_tokens()
    with_side = model(tokens)
    with disable_adapter(model):
        assert torch.equal(model(tokens), plain_logits(model, tokens))
    assert torch.equal(model(tokens), with_side)
    assert not torch.equal(with_side, plain_logits(model, tokens))


def test_the_backbone_stays_in_evaluation_mode():
    model = tiny_model(sizes={"attn_dropout": 0.5})
    assert model.train() is model
    assert model.training
    backbone = [m for n, m in model.named_modules() if n and not n.startswith("side")]
    assert not any(module.training for module in backbone)
    assert all(module.training for module in model.side.modules())
    tokens = random_tokens()
    assert not torch.equal(model(tokens), model(tokens))  # the side network's own dropout
    model.side.disabled = True
    assert torch.equal(model(tokens), model(tokens))
    model.eval()
    assert not any(module.training for module in model.modules())


def left_padded(*lengths):
    rows = [torch.randint(1, TINY["vocab_size"], (n,)) for n in lengths]
    return torch.stack([F.pad(row, (max(lengths) - len(row), 0)) for row in rows])


def greedy(model, prompt):
    return generate(model, prompt, max_generated_tokens=7, top_k=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(5,), (1,), (6, 6), (6, 2, 4)])
def test_generation_with_caches_equals_generation_without(lengths, dtype):
    """A second round on the same caches shows that both networks' caches were emptied."""
    model = tiny_model(dtype=dtype).eval()
    prompts = [left_padded(*lengths), left_padded(*lengths)]
    without = [greedy(model, prompt) for prompt in prompts]
    model.setup_caches(batch_size=len(lengths), dtype=dtype, decoder_max_seq_len=20)
    close = FP32 if dtype == torch.float32 else {"rtol": 0, "atol": 0.06}
    for prompt, (tokens, logits) in zip(prompts, without, strict=True):
        cached_tokens, cached_logits = greedy(model, prompt)
        # Where bf16 makes two tokens equally likely, what follows them may rightly differ.
        same = (cached_tokens == tokens).all(0)[prompt.shape[1] :]
        num_same = len(same) if dtype == torch.float32 else int(same.long().cumprod(0).sum())
        assert num_same >= 3
        compared = slice(0, num_same + 1)
        torch.testing.assert_close(cached_logits[:, compared], logits[:, compared], **close)
        assert dtype != torch.float32 or torch.equal(cached_tokens, tokens)
        model.reset_caches()


def test_caches_left_full_change_what_follows():
    """So the test above would see a cache that reset_caches forgot."""
    model = tiny_model().eval()
    tokens = random_tokens(batch=1, length=4)
    model.setup_caches(batch_size=1, dtype=torch.float32, decoder_max_seq_len=20)
    mask = torch.ones(1, 4, 20, dtype=torch.bool).tril()
    position = torch.arange(4)
    first = model(tokens, mask=mask, input_pos=position)
    for layer in model.layers:
        layer.reset_cache()
    mask_all = torch.ones(1, 4, 20, dtype=torch.bool).tril(4)
    assert not torch.allclose(model(tokens, mask=mask_all, input_pos=position), first)
    model.reset_caches()
    assert torch.equal(model(tokens, mask=mask, input_pos=position), first)


def test_reordering_every_cache_of_the_model_reorders_both_networks():
    """What beam search does between tokens; the authors' code forgets the side network's."""
    model = tiny_model().eval()
    tokens = random_tokens(batch=3, length=6)
    order = torch.tensor([2, 0, 0])

    def next_logits(rows, caches_in_order):
        model.setup_caches(batch_size=3, dtype=torch.float32, decoder_max_seq_len=8)
        mask = torch.ones(3, 8, 8, dtype=torch.bool).tril()
        model(rows[:, :5], mask=mask[:, :5], input_pos=torch.arange(5)[None])
        if caches_in_order:
            for cache in [m for m in model.modules() if isinstance(m, KVCache)]:
                cache.k_cache.copy_(cache.k_cache[order])
                cache.v_cache.copy_(cache.v_cache[order])
        last = tokens[order, 5:]
        logits = model(last, mask=mask[:, 5:6], input_pos=torch.tensor([[5]]))
        delete_kv_caches(model)
        return logits

    num_caches = 0
    with torch.no_grad():
        reordered, expected = next_logits(tokens, True), next_logits(tokens[order], False)
        model.setup_caches(batch_size=3, dtype=torch.float32)
        num_caches = sum(isinstance(m, KVCache) for m in model.modules())
    torch.testing.assert_close(reordered, expected, **FP32)
    assert num_caches == 2 * TINY["num_layers"]


def test_caches_have_the_side_network_sizes():
    model = tiny_model()
    model.setup_caches(batch_size=2, dtype=torch.bfloat16)
    assert model.caches_are_enabled()
    for block in model.side.blocks:
        cache = block.attn.kv_cache
        heads, head_dim = block.attn.num_kv_heads, block.attn.head_dim
        assert cache.k_cache.shape == (2, heads, TINY["max_seq_len"], head_dim)
        assert cache.k_cache.dtype == torch.bfloat16


def test_reset_without_caches_is_refused():
    with pytest.raises(RuntimeError, match="caches are not setup"):
        tiny_model().reset_caches()


@pytest.mark.parametrize("tied", [True, False])
def test_a_stock_state_dict_loads_with_exactly_the_side_missing(tied):
    stock = tiny_backbone(tied=tied)
    model = tiny_model(tied=tied)
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {f"side.{name}" for name in model.side.state_dict()}
    quantize_linears(stock.layers)
    tokens = random_tokens()
    assert torch.equal(plain_logits(model, tokens), stock(tokens))


@pytest.mark.parametrize("num_chunks", [1, 3, 4])
def test_chunked_logits_equal_whole_ones(num_chunks):
    model = tiny_model()
    tokens = random_tokens(length=11)
    expected = model(tokens)
    model.set_num_output_chunks(num_chunks)
    chunks = model(tokens)
    assert len(chunks) == num_chunks
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, **FP32)


def test_without_its_output_layer_the_model_returns_the_heads_input():
    model = tiny_model()
    tokens = random_tokens()
    expected = model(tokens)
    model.skip_output_layer = True
    y_BTD = model(tokens)
    assert y_BTD.shape == (*tokens.shape, TINY["embed_dim"])
    assert torch.equal(model.output(y_BTD), expected)


def test_quantisation_reaches_every_linear_of_every_layer_and_nothing_else():
    model = tiny_model()
    backbone = {
        name: type(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("side.")
    }
    quantised = {name for name, kind in backbone.items() if kind is NF4Linear}
    per_layer = 4 + 3  # q, k, v, output_proj; w1, w2, w3
    assert len(quantised) == per_layer * TINY["num_layers"]
    assert set(backbone) - quantised == {"output"}
    assert not any(isinstance(module, NF4Linear) for module in model.side.modules())


def test_a_side_block_beside_no_layer_is_refused():
    side = tiny_model().side
    with pytest.raises(
        ValueError, match="belongs to layer 2, but the backbone has only layers 0 to 1"
    ):
        QSTDecoder(tiny_backbone(num_layers=2), side)


@pytest.mark.parametrize("problem", ["length", "mask", "positions"])
def test_inputs_are_checked_as_torchtune_checks_them(problem):
    model = tiny_model()
    if problem == "length":
        with pytest.raises(ValueError, match="max_seq_len"):
            model(random_tokens(length=TINY["max_seq_len"] + 1))
        return
    model.setup_caches(batch_size=2, dtype=torch.float32)
    mask = None if problem == "mask" else torch.ones(2, 3, 64, dtype=torch.bool)
    match = "causal masks" if problem == "mask" else "input positions"
    with pytest.raises(ValueError, match=match):
        model(random_tokens(length=3), mask=mask)


def test_it_builds_and_runs_on_meta():
    with torch.device("meta"), training.set_default_dtype(torch.bfloat16):
        model = tiny_model(random=False)
        assert all(p.is_meta for p in model.parameters())
    assert {p.dtype for p in model.side.parameters()} == {torch.float32}


@pytest.mark.parametrize("recompute", [True, False])
def test_no_hidden_state_outlives_the_forward_pass_where_its_summary_is_enough(recompute):
    """A closure that is kept until backward can hold what autograd itself does not."""
    model = tiny_model(downsample="avgpool")
    model.side.recompute = recompute
    hidden = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: hidden.append(weakref.ref(out)))
    logits = model(random_tokens())
    assert len(hidden) == len(model.layers)
    assert not [ref for ref in hidden if ref() is not None]
    logits.sum().backward()
