"""PEQA over each model type of transformers, with tiny random weights.

The reference is transformers' own model over the dense weights w = s (q - z), by plain autograd. A
few types run by default, all with ``-m slow``.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.utils import logging

from qst_tune.backbone.experts import ExpertLinears
from qst_tune.backbone.loading import load_transformers_backbone
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.errors import UserError
from qst_tune.models import peqa_decoder, peqa_from_hf
from qst_tune.modules import LinearCrossEntropyLoss
from qst_tune.modules.peqa_linear import PEQALinear
from tests.support.model_types import (
    TYPES,
    assert_rows_give_what_they_give_alone,
    loss_of,
    tiny_model,
    tokens_of,
)
from tests.support.numbers import losses_of_steps

# fp32 on a CPU, logits around 1: measured 1e-6.
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
CPU = torch.device("cpu")
# GPT-2's Conv1D is no linear layer.
CANNOT_TRAIN = ("gpt2",)

SAMPLE = ("llama", "qwen3", "gemma2", "opt", "gpt_neox", "qwen3_moe", "gpt_oss", "phi3", "falcon")
by_type = pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow)
        for name in TYPES
        if name not in CANNOT_TRAIN
    ],
)


@pytest.fixture(autouse=True)
def _quiet():
    logging.set_verbosity_error()


def model_of(model_type: str, **settings: Any) -> Any:
    return peqa_decoder(TransformersBackbone(tiny_model(model_type)), **settings).eval()


def dense_of(model: Any, model_type: str) -> Any:
    """transformers' own model with the decoded weights, all of which get a gradient."""
    dense = tiny_model(model_type)
    for name, module in model.backbone.model.named_modules():
        if isinstance(module, ExpertLinears):
            path, _, leaf = name.rpartition(".")
            weight = torch.nn.Parameter(module.dense().detach().clone())
            setattr(dense.get_submodule(path), leaf, weight)
        elif isinstance(module, PEQALinear) and ".experts." not in name:
            decoded = module.dense_weight(torch.float32)
            dense.get_submodule(name).weight = torch.nn.Parameter(decoded)
    return dense


def expected_gradient(linear: PEQALinear, weight_grad: torch.Tensor) -> torch.Tensor:
    """dL/ds of w = s (q - z): the sum over a group of dL/dw (q - z)."""
    codes, scale, zero_point = linear.affine_weight()
    width = linear.layout.group_size
    centred = codes.float() - zero_point.float().repeat_interleave(width, 1)[:, : codes.shape[1]]
    product = F.pad(weight_grad * centred, (0, -codes.shape[1] % width))
    return product.view(*scale.shape, width).sum(-1)


@by_type
def test_logits_and_gradients_are_those_of_the_dense_weights(model_type: str) -> None:
    """Rows of 24 tokens, longer than the sliding windows; half the types in groups."""
    group_size = 24 if TYPES.index(model_type) % 2 else None
    model = model_of(model_type, group_size=group_size)
    dense, tokens = dense_of(model, model_type), tokens_of(24)
    logits, expected = model(tokens), dense(input_ids=tokens, use_cache=False).logits
    # Gemma 4's norms enlarge errors: in fp32 the reference's gradients differ from fp64's by 9e-4.
    atol, atol_of_gradients = (5e-5, 2e-3) if model_type == "gemma4_text" else (1e-5, 1e-4)
    torch.testing.assert_close(logits, expected, rtol=0, atol=atol)
    loss_of(logits, tokens).backward()
    loss_of(expected, tokens).backward()
    compared = 0
    for name, module in model.backbone.model.named_modules():
        if isinstance(module, ExpertLinears):
            grads = dense.get_parameter(name).grad
            grads = grads.mT if module.is_transposed else grads
            pairs = list(zip(module.experts, grads, strict=True))
        elif isinstance(module, PEQALinear) and ".experts." not in name:
            pairs = [(module, dense.get_submodule(name).weight.grad)]
        else:
            continue
        for linear, grad in pairs:
            own = linear.weight_scale.grad
            if grad is None or own is None:
                assert not any(g.any() for g in (grad, own) if g is not None)
                continue
            wanted = expected_gradient(linear, grad)
            size = wanted.abs().max().clamp(min=1e-3)
            torch.testing.assert_close(
                own / size, wanted / size, rtol=0, atol=atol_of_gradients, msg=name
            )
            compared += 1
    assert compared >= 4


def losses_of_three_steps(model: Any) -> list[float]:
    """Through the loss of our configs, which applies the model's soft cap and scale itself."""
    loss_function = LinearCrossEntropyLoss()
    loss_function.set_model_output(model)
    tokens = tokens_of(24)
    return losses_of_steps(
        lambda: loss_function(model(tokens)[:, :-1], tokens[:, 1:]), model.task().values(), lr=1e-3
    )


@by_type
def test_only_scales_change_and_the_loss_falls_with_recomputation_or_without(
    model_type: str,
) -> None:
    runs = []
    for recompute in (False, True):
        model = model_of(model_type).train()
        before = copy.deepcopy(model.state_dict())
        if recompute:
            model.recompute_layers()
        losses = losses_of_three_steps(model)
        assert losses[2] < losses[1] < losses[0]
        after = model.state_dict()
        assert after.keys() == before.keys()
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert all(name.endswith(".weight_scale") for name in changed)
        assert len(changed) == sum(p.grad is not None for p in model.task().values()) >= 4
        runs.append((losses, list(model.task())))
    assert runs[0] == runs[1]


@by_type
@torch.no_grad()
def test_padding_packing_and_caches_give_what_a_row_gives_alone(model_type: str) -> None:
    assert_rows_give_what_they_give_alone(model_of(model_type), model_type)


@by_type
@torch.no_grad()
def test_a_saved_model_is_loaded_as_it_was(model_type: str, tmp_path: Path) -> None:
    """The same as the model that is rounded in memory, to the last bit, with trainable scales."""
    tiny_model(model_type).save_pretrained(tmp_path)
    if model_type == "zamba2":  # two of its layers are one, and transformers looks for its weights
        model = peqa_from_hf(str(tmp_path))
        with pytest.raises(UserError, match="transformers cannot load this model"):
            load_transformers_backbone(model.backbone, tmp_path, dtype=torch.float32, device=CPU)
        return
    with torch.device("meta"):
        model = peqa_from_hf(str(tmp_path), bits=3, group_size=32)
    names, described = list(model.task()), model.backbone.quantization
    load_transformers_backbone(model.backbone, tmp_path, dtype=torch.float32, device=CPU)
    expected = model_of(model_type, bits=3, group_size=32)
    assert list(model.task()) == names == list(expected.task())
    assert model.backbone.quantization == described == expected.backbone.quantization
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert torch.equal(model(tokens_of(24)), expected(tokens_of(24)))


def test_chunks_of_logits_and_the_heads_input_give_the_logits() -> None:
    model, tokens = model_of("gemma2"), tokens_of(12)
    logits = model(tokens)
    model.set_num_output_chunks(3)
    torch.testing.assert_close(torch.cat(model(tokens), dim=1), logits)
    model.set_num_output_chunks(0)
    model.skip_output_layer = True
    assert torch.equal(model.output(model(tokens)).float(), logits)


@torch.no_grad()
def test_a_task_is_exchanged_in_place_and_back_bit_for_bit() -> None:
    model, tokens = model_of("qwen3_moe"), tokens_of(12)
    a = {name: value.detach().clone() for name, value in model.task().items()}
    logits = model(tokens)
    model.load_task({name: value * 1.1 for name, value in a.items()})
    assert not torch.allclose(model(tokens), logits)
    model.load_task(a)
    assert torch.equal(model(tokens), logits)


@pytest.mark.parametrize("form", ["int8"])
def test_scales_train_under_a_quantised_embedding(form: Any) -> None:
    model, tokens = model_of("gemma2", embedding_quantization=form), tokens_of(12)
    loss = LinearCrossEntropyLoss()
    loss.set_model_output(model)
    loss(model(tokens)[:, :-1], tokens[:, 1:]).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.task().values())


def test_a_model_without_linear_layers_is_one_line() -> None:
    with pytest.raises(UserError, match="model_type='gpt2' has no linear layers of torch's own"):
        model_of("gpt2")
