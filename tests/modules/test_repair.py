"""A repaired layer computes with the rounded weight plus the product, in every format."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qst_tune.modules.backbone_formats import BaseQuantization, quantization_of, quantize_linears
from qst_tune.modules.memory import count_saved_activations
from qst_tune.modules.plain_parts import expose_parts, plain_parts
from qst_tune.modules.repair import Repair

FORMATS: list[BaseQuantization] = ["nf4", "fp4", "int4", "int8"]
# Sums of 96 products, and of two or three of those, in another order: (relative, absolute).
CLOSE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 1e-1)}


def repaired(
    form: BaseQuantization, dtype: torch.dtype = torch.float32, *, bias: bool = True
) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64, bias=bias, dtype=dtype))
    quantize_linears(model, form)
    model[0].repair = Repair(
        torch.randn(64, 5).to(dtype) / 4, torch.randn(5, 96).to(dtype), "rank 5"
    )
    return model[0].requires_grad_(False)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_output_and_input_gradient_are_those_of_the_dense_sum(
    form: BaseQuantization, bias: bool, dtype: torch.dtype
) -> None:
    layer = repaired(form, dtype, bias=bias)
    repair, layer.repair = layer.repair, None
    weight = layer.dense_weight(torch.float32) + repair.left.float() @ repair.right.float()
    layer.repair = repair
    close = dict(zip(("rtol", "atol"), CLOSE[dtype], strict=True))
    torch.testing.assert_close(layer.dense_weight(torch.float32), weight, rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 70, 96).to(dtype).requires_grad_()
    y = layer(x)
    expected = F.linear(x.float(), weight, None if layer.bias is None else layer.bias.float())
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, **close)
    grad = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(ours.float(), grad.float() @ weight, **close)
    with torch.no_grad():  # one token takes other kernels
        torch.testing.assert_close(layer(x[:, :1]).float(), expected[:, :1], **close)


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_more_is_saved_for_backward_than_without_a_repair(form: BaseQuantization) -> None:
    layer = repaired(form)
    with count_saved_activations(layer) as with_repair:
        layer(torch.randn(4, 96, requires_grad=True))
    layer.repair = None
    with count_saved_activations(layer) as without:
        layer(torch.randn(4, 96, requires_grad=True))
    assert with_repair.num_bytes == without.num_bytes


@pytest.mark.parametrize("form", FORMATS)
def test_it_is_a_part_of_the_formats_name(form: BaseQuantization) -> None:
    layer = repaired(form)
    name = quantization_of(layer)
    layer.repair = None
    assert name == f"{quantization_of(layer)} + rank 5"


@pytest.mark.parametrize("form", FORMATS)
def test_its_factors_are_plain_parts_and_frozen(form: BaseQuantization) -> None:
    """So that devices share them and files store them as any other weight."""
    layer, x = repaired(form), torch.randn(3, 96)
    expected = layer(x)
    assert {n: p.shape for n, p in plain_parts(layer.repair).items()} == {
        "left": (64, 5),
        "right": (5, 96),
    }
    for module in layer.modules():
        expose_parts(module)
    assert torch.equal(layer(x), expected)
    assert not any(p.requires_grad for p in layer.repair.parameters())


@torch.no_grad()
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", CLOSE)
def test_without_gradient_it_computes_the_same_bits_in_no_more_memory(
    form: BaseQuantization, dtype: torch.dtype
) -> None:
    layer, x = repaired(form, dtype, bias=False), torch.randn(2, 70, 96).to(dtype)
    y = layer(x)
    with torch.enable_grad():
        assert torch.equal(layer(x), y)
    before = y.clone()
    assert layer.repair(x, y) is y
    assert not torch.equal(y, before)


def test_under_autocast_the_outputs_dtype_is_autocasts() -> None:
    layer, x = repaired("nf4", bias=False), torch.randn(3, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), y)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=5e-2, atol=0.2)


def test_another_dtype_of_the_input_decides_the_output() -> None:
    layer = repaired("nf4", torch.bfloat16)
    assert layer(torch.randn(3, 96)).dtype == torch.float32
