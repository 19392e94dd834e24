"""Experts as linear layers compute what one dense weight does, one decoded at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qst_tune.backbone.directory_methods import read_directory_format
from qst_tune.backbone.expert_linears import ExpertLinears, JoinedLinear
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.quantization.gptq import from_gptq
from tests.reference import stored_formats as formats
from tests.support.stored_models import FORMATS

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
            stored.linear(from_gptq(parts, bits=4, form="gptq"), None, torch.float32)
            for parts, _ in pieces
        )
        for pieces in drawn
    ]
    ours = ExpertLinears(experts, torch.float32)
    dense = torch.stack([torch.cat([weight for _, weight in pieces]) for pieces in drawn])
    assert ours.shape == dense.shape
    assert torch.equal(ours.dense(), dense)
    x = torch.randn(5, IN)
    torch.testing.assert_close(F.linear(x, ours[2]), x @ dense[2].T)
