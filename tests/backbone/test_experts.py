"""Experts keep their codes, and compute what the dense ones do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qst_tune.backbone import experts as module
from qst_tune.backbone.directory_methods import read_directory_format
from qst_tune.backbone.experts import (
    ExpertLinears,
    JoinedLinear,
    QuantizedExperts,
    quantize_experts,
)
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.models import qst_decoder
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.quantization.gptq import from_gptq
from qst_tune.quantization.nf4 import dequantize_nf4, quantize_nf4
from tests.reference import stored_formats as formats
from tests.support.model_types import tiny_model
from tests.support.stored_models import FORMATS

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


NUM_EXPERTS, OUT, IN = 3, 16, 64


def integers(*, is_transposed: bool = False, group_size: int | None = 32) -> ExpertLinears:
    torch.manual_seed(0)
    experts = [PEQALinear(torch.randn(OUT, IN), group_size=group_size) for _ in range(NUM_EXPERTS)]
    return ExpertLinears(experts, torch.float32, is_transposed=is_transposed)


def reference(ours: ExpertLinears) -> tuple[torch.Tensor, list[nn.Parameter]]:
    """The dense weight of the parameter's shape by plain autograd: w = s (q - z)."""
    scales, weights = [], []
    for linear in ours.experts:
        codes, scale, zero_point = linear.affine_weight()
        scales.append(nn.Parameter(scale.clone()))
        centred = codes.float() - zero_point.float().repeat_interleave(IN // scale.shape[1], 1)
        weights.append(centred * scales[-1].repeat_interleave(IN // scale.shape[1], 1))
    dense = torch.stack(weights)
    return dense.mT if ours.is_transposed else dense, scales


def eager(x: torch.Tensor, weight) -> torch.Tensor:
    """As transformers' experts: an index, then a product; not every expert is hit."""
    return F.linear(x[0], weight[0]) + F.linear(x[2], weight[torch.tensor(2)])


def eager_transposed(x: torch.Tensor, weight) -> torch.Tensor:
    return x[0] @ weight[0] + x[2] @ weight[2]


def all_at_once(x: torch.Tensor, weight) -> torch.Tensor:
    return torch.bmm(x, weight)


def by_an_unknown_operation(x: torch.Tensor, weight) -> torch.Tensor:
    return torch.einsum("ti,oi->to", x[0], weight[0]) + (x @ torch.transpose(weight, 1, 2))[2]


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize(
    ("compute", "is_transposed"),
    [
        (eager, False),
        (by_an_unknown_operation, False),
        (eager_transposed, True),
        (all_at_once, True),
    ],
)
def test_products_and_gradients_are_those_of_the_dense_weight(
    compute, is_transposed: bool, group_size: int | None
) -> None:
    ours = integers(is_transposed=is_transposed, group_size=group_size)
    dense, scales = reference(ours)
    assert ours.shape == dense.shape
    x = torch.randn(NUM_EXPERTS, 5, IN, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    weights = torch.randn(5, OUT)
    actual, expected = compute(x, ours), compute(again, dense)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-5, atol=1e-4)
    for linear, scale in zip(ours.experts, scales, strict=True):
        grad = linear.weight_scale.grad
        if grad is None:  # of an expert that no token chose
            grad = torch.zeros_like(scale)
        torch.testing.assert_close(grad, scale.grad, rtol=1e-4, atol=1e-3)


def test_an_index_decodes_one_expert_and_not_the_others(monkeypatch) -> None:
    experts = [NF4Linear(torch.randn(OUT, IN)) for _ in range(NUM_EXPERTS)]
    ours = ExpertLinears(experts, torch.float32)
    used = []
    for index, linear in enumerate(experts):
        linear.register_forward_hook(lambda *_, index=index: used.append(index))
    monkeypatch.setattr(ExpertLinears, "dense", lambda self: pytest.fail("all were decoded"))
    x = torch.randn(4, IN)
    bias = torch.randn(OUT)
    expected = x @ experts[1].dense_weight(torch.float32).T + bias
    torch.testing.assert_close(F.linear(x, ours[1], bias), expected)
    assert used == [1]


def test_experts_that_a_directory_stores_in_pieces_are_joined() -> None:
    generator = torch.Generator().manual_seed(0)
    stored = read_directory_format("config.json", FORMATS["gptq"][0])
    drawn = [[formats.gptq(rows, IN, generator) for rows in (16, 24)] for _ in range(NUM_EXPERTS)]
    experts = [
        JoinedLinear(
            [
                stored.linear(from_gptq(parts, bits=4, form="gptq"), None, torch.float32)
                for parts, _ in pieces
            ]
        )
        for pieces in drawn
    ]
    ours = ExpertLinears(experts, torch.float32)
    dense = torch.stack([torch.cat([weight for _, weight in pieces]) for pieces in drawn])
    assert ours.shape == dense.shape
    assert torch.equal(ours.dense(), dense)
    x = torch.randn(5, IN)
    torch.testing.assert_close(F.linear(x, ours[2]), x @ dense[2].T)
