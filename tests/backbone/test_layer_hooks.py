"""LoRA in the last layers of each model type of transformers, with tiny random weights.

The reference is transformers' own model over the merged weights W + s B A, by plain autograd. A few
types run by default, all with ``-m slow``.
"""

import copy
from typing import Any

import pytest
import torch
from transformers.utils import logging

from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.models import qst_decoder
from tests.support.model_types import (
    TYPES,
    assert_rows_give_what_they_give_alone,
    loss_of,
    tiny_model,
    tokens_of,
)

SAMPLE = ("llama", "gemma2", "opt", "gpt_neox", "qwen3_moe", "phi3", "falcon", "qwen3_5_text")
by_type = pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in TYPES],
)
LORA: dict[str, Any] = {"lora_rank": 2, "lora_alpha": 4.0, "reduction_factor": 4}


@pytest.fixture(autouse=True)
def _quiet():
    logging.set_verbosity_error()


def dial_of(model_type: str, k: int, blocks: int = 0, **settings: Any) -> Any:
    return dial_over(tiny_model(model_type), k, blocks, **settings)


def dial_over(theirs: Any, k: int, blocks: int = 0, **settings: Any) -> Any:
    model = qst_decoder(
        TransformersBackbone(theirs),
        **{"base_quantization": "none", **LORA, **settings},
        lora_layers=k,
        num_side_blocks=blocks,
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.side.named_parameters():
            if name.endswith(".b"):
                parameter.normal_(std=0.05)
    return model.eval()


def merged_of(model: Any, model_type: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """transformers' own model over merged weights, and the weights, which get gradients."""
    dense = copy.deepcopy(model.backbone.model).requires_grad_(False)
    layers = TransformersBackbone(dense).layers
    weights = {}
    for index in range(model.side.lora.first, len(layers)):
        for path, pair in model.side.lora.pairs(index).items():
            linear = layers[index].get_submodule(path)
            change = pair.scale * (pair.b @ pair.a).detach()
            if model_type == "gpt2":  # [I, O]
                change = change.T
            linear.weight = torch.nn.Parameter(linear.weight + change)
            weights[f"{index}.{path}"] = linear.weight
    return dense.requires_grad_(True), weights


@by_type
@pytest.mark.parametrize("recompute", [False, True])
def test_logits_and_gradients_are_those_of_merged_weights(model_type: str, recompute: bool) -> None:
    """dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T."""
    model, tokens = dial_of(model_type, 2), tokens_of(24)
    model.side.recompute = recompute
    dense, weights = merged_of(model, model_type)
    logits, expected = model(tokens), dense(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)
    loss_of(logits, tokens).backward()
    loss_of(expected, tokens).backward()
    assert weights
    assert all(p.grad is None for p in model.frozen.parameters())
    for name, weight in weights.items():
        index, _, path = name.partition(".")
        pair = model.side.lora.pairs(int(index))[path]
        grad = weight.grad
        if grad is None:  # of the last layer's keys where a type computes with none
            assert pair.a.grad is None or not pair.a.grad.any()
            continue
        grad = grad.T if model_type == "gpt2" else grad
        wanted = {"a": pair.scale * pair.b.T @ grad, "b": pair.scale * grad @ pair.a.T}
        for leaf, value in wanted.items():
            size = value.abs().max().clamp(min=1e-3)
            found = getattr(pair, leaf).grad
            torch.testing.assert_close(
                found / size, value / size, rtol=0, atol=2e-3, msg=f"{name}.{leaf}"
            )


@by_type
@torch.no_grad()
def test_a_pass_in_two_parts_gives_the_same_bits(model_type: str) -> None:
    model, tokens = dial_of(model_type, 2, blocks=2), tokens_of(24)
    backbone, lora = model.backbone, model.side.lora
    assert backbone.can_split
    whole: list[torch.Tensor] = []
    expected = backbone.run(tokens, taps=[0, 1, 2, 3, 4], visit=whole.append, lora=lora)
    model.keep_reference()
    y, reference = model.with_reference(tokens)
    model.skip_output_layer = True
    assert torch.equal(y, model(tokens))
    torch.testing.assert_close(reference, y, rtol=0, atol=1e-5)  # Mamba's differ in last bits
    split: list[torch.Tensor] = []
    state = backbone.prefix(tokens, until=2, taps=[0, 1, 2], visit=split.append)
    rest: Any = {"taps": [3, 4], "visit": split.append}
    found = backbone.suffix(tokens, state, since=2, lora=lora, **rest)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(split, whole, strict=True))
    assert not torch.equal(backbone.suffix(tokens, state, since=2, **rest), expected)


@torch.no_grad()
def test_where_layers_share_keys_the_reference_takes_a_pass_of_its_own() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    theirs = tiny_model("gemma3n_text", num_kv_shared_layers=1, layer_types=kinds)
    model = dial_over(theirs, 2, blocks=2)
    assert not model.backbone.can_split
    model.keep_reference()
    y, reference = model.with_reference(tokens_of(24))
    model.skip_output_layer = True
    assert torch.equal(y, model(tokens_of(24)))
    assert torch.equal(reference, y)


@by_type
@torch.no_grad()
def test_padding_packing_and_caches_give_what_a_row_gives_alone(model_type: str) -> None:
    model = dial_of(model_type, 3, blocks=2)
    assert_rows_give_what_they_give_alone(model, model_type, atol=2e-5)


@pytest.mark.parametrize("form", ["nf4", "int8", "int4"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "falcon"])
def test_over_quantised_weights_a_gradient_reaches_every_change(model_type: str, form: str) -> None:
    model, tokens = dial_of(model_type, 4, base_quantization=form), tokens_of(24)
    loss_of(model(tokens), tokens).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.side.parameters())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("side.lora.") for name in trained)
