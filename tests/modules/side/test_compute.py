"""The dtype of the side network, and what is saved for backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtune import training

from qst_tune.models import qst_decoder
from tests.support.numbers import (
    random_tokens,
    tiny_backbone,
)
from tests.support.side_networks import (
    kept_bytes,
    next_token_loss,
    our_gradients,
    packed_mask,
    tiny_model,
)


@pytest.mark.parametrize("variant", ["default", "paper", "authors"])
@pytest.mark.parametrize("downsample", ["linear", "lora", "adapter", "maxpool", "avgpool"])
def test_an_fp32_side_network_over_a_bfloat16_backbone(downsample, variant):
    """Products in bf16, output bf16, gradients fp32."""
    with training.set_default_dtype(torch.bfloat16):
        model = qst_decoder(
            tiny_backbone(dtype=torch.bfloat16),
            reduction_factor=4,
            downsample=downsample,
            variant=variant,
        )
    assert {parameter.dtype for parameter in model.side.parameters()} == {torch.float32}
    if variant != "authors":  # leave the start, where nothing but the last layer has a gradient
        for parameter in (model.side.upsample.weight, *model.side.output_mix.parameters()):
            nn.init.constant_(parameter, 0.3)
    products = []
    up_proj = model.side.blocks[0].mlp.w1
    up_proj.register_forward_hook(lambda module, args, output: products.append(output.dtype))
    outputs = []
    model.side.output_mix.register_forward_hook(lambda m, a, output: outputs.append(output.dtype))
    tokens = random_tokens()
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert products == [torch.bfloat16]
    assert outputs == [torch.bfloat16]
    for name, parameter in model.side.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.any(), name


def test_a_side_network_in_the_backbones_dtype_needs_no_autocast():
    model = qst_decoder(tiny_backbone(dtype=torch.bfloat16), reduction_factor=4)
    model.side.to(torch.bfloat16)
    tokens = random_tokens()
    logits = model(tokens)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    grads = {p.grad.dtype for p in model.side.parameters() if p.grad is not None}
    assert grads == {torch.bfloat16}


@pytest.mark.parametrize("hidden_bits", [16, 8])
def test_recomputing_with_dropout_changes_no_gradient(hidden_bits):
    """Backward sees the mask of the forward pass, whatever drew numbers in between."""
    model = tiny_model(dropout=0.5, hidden_bits=hidden_bits, sizes={"attn_dropout": 0.3})
    tokens = random_tokens()
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        model.side.recompute = recompute
        loss = next_token_loss(model(tokens), tokens)
        torch.rand(100)
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.side.named_parameters()})
    for name, grad in gradients[0].items():
        assert torch.equal(gradients[1][name], grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_the_side_network_changes_no_gradient(dtype):
    """The authors' code skips gates and downsamplers when it checkpoints."""
    model = tiny_model(dtype=dtype, variant="authors")
    tokens = random_tokens()
    expected = our_gradients(model, tokens)
    model.zero_grad()
    model.side.recompute = True
    recomputed = our_gradients(model, tokens)
    for name, grad in expected.items():
        assert torch.equal(recomputed[name], grad), name


def test_recomputing_the_side_network_keeps_less():
    model = tiny_model()
    tokens = random_tokens(length=32)
    everything = kept_bytes(lambda: model(tokens))
    model.side.recompute = True
    # What stays: the head's and upsampler's part, and a hidden and a side state of every layer.
    assert kept_bytes(lambda: model(tokens)) < 0.7 * everything


@pytest.mark.parametrize(("min_head_dim", "is_dense"), [(4, True), (24, False)])
def test_a_mask_of_packed_rows_becomes_dense_for_heads_that_flex_attention_refuses(
    min_head_dim, is_dense
):
    model = qst_decoder(tiny_backbone(), reduction_factor=4, min_head_dim=min_head_dim)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 1, 1, 2, 2, 3, 3]])
    tokens = random_tokens(2, 8)
    mask = packed_mask(documents)
    given = model.side_where(tokens, mask=mask, input_pos=None)["mask"]
    assert (given is mask) != is_dense
    if is_dense:
        expected = (documents[:, :, None] == documents[:, None]).tril()
        assert torch.equal(given, expected)
