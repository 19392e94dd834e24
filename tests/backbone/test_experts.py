"""Experts in 4 bits are dense one at a time."""

import pytest
import torch

from qst_tune.backbone import experts as module
from qst_tune.backbone.experts import QuantizedExperts, quantize_experts
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.models import qst_decoder
from qst_tune.quantization.nf4 import dequantize_nf4, quantize_nf4
from tests.support.model_types import tiny_model

WEIGHT = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_each_expert_is_quantised_as_a_linear_is(form: str) -> None:
    quantized = quantize_experts(WEIGHT, form)
    expected = torch.stack([dequantize_nf4(quantize_nf4(w, form)) for w in WEIGHT])
    assert quantized.shape == WEIGHT.shape
    assert quantized.dtype == WEIGHT.dtype
    assert torch.equal(quantized.dense(), expected)
    for index in (1, -1, torch.tensor(2)):
        assert torch.equal(quantized[index], expected[index])
    assert torch.equal(torch.bmm(torch.ones(3, 2, 24), quantized), torch.ones(3, 2, 24) @ expected)


def test_it_is_stored_in_its_parts_alone() -> None:
    quantized = quantize_experts(WEIGHT.bfloat16(), "nf4")
    names, context = quantized.__tensor_flatten__()
    parts = {name: getattr(quantized, name) for name in names}
    num_bytes = sum(part.nbytes for part in parts.values())
    assert num_bytes < 0.57 * WEIGHT.numel()  # 0.52 in a weight of more blocks
    again = QuantizedExperts.__tensor_unflatten__(parts, context, WEIGHT.shape, None)
    assert torch.equal(again.dense(), quantized.dense())


@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_on_meta_it_has_the_parts_that_it_will_have(form: str) -> None:
    """An estimate counts them."""
    parts = [quantize_experts(weight, form).parts for weight in (WEIGHT, WEIGHT.to("meta"))]
    shapes = [[(part.shape, part.dtype) for part in of_one] for of_one in parts]
    assert shapes[0] == shapes[1]


def test_as_a_parameter_it_is_frozen_and_keeps_its_type() -> None:
    parameter = torch.nn.Parameter(quantize_experts(WEIGHT, "nf4"), requires_grad=False)
    assert isinstance(parameter, QuantizedExperts)
    assert not parameter.requires_grad


def test_it_moves_to_a_device_as_codes() -> None:
    """``Trainer`` moves whole models."""
    owner = torch.nn.Module()
    owner.weight = torch.nn.Parameter(quantize_experts(WEIGHT, "nf4"), requires_grad=False)
    expected = owner.weight.dense()
    moved = owner.weight.to("cpu", copy=True)
    assert isinstance(moved, QuantizedExperts)
    assert torch.equal(moved.dense(), expected)
    assert moved.parts[3].data_ptr() != owner.weight.parts[3].data_ptr()
    assert not isinstance(owner.weight.to(torch.bfloat16), QuantizedExperts)
    owner.to("meta")
    assert isinstance(owner.weight, QuantizedExperts)
    assert all(part.is_meta for part in owner.weight.parts)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_a_pass_never_holds_two_dense_experts_of_a_weight(model_type, monkeypatch) -> None:
    """Only experts that a token chose are decoded, each by itself."""
    model = qst_decoder(TransformersBackbone(tiny_model(model_type)), reduction_factor=4)
    decoded = []
    decode = module.dequantize_nf4
    monkeypatch.setattr(
        module, "dequantize_nf4", lambda weight: decoded.append(weight.shape) or decode(weight)
    )
    monkeypatch.setattr(QuantizedExperts, "dense", lambda self: pytest.fail("all were decoded"))
    with torch.no_grad():
        model(torch.tensor([[5]]))
    # 4 layers, 2 of 4 experts for the one token, 2 weights each.
    assert len(decoded) == 4 * 2 * 2
