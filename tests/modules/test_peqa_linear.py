"""A linear layer whose codes stay and whose scales train."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from qst_tune.modules import peqa_linear
from qst_tune.modules.peqa_linear import PEQALinear, scale_columns_
from qst_tune.quantization import affine
from qst_tune.quantization.gptq import from_gptq
from tests.reference import stored_formats

GROUPS = [None, 16, 20]  # one scale a row; groups that fill a row; a smaller last group
O, I = 14, 48  # noqa: E741


def layer_of(group_size=None, *, bits=4, bias=False, zero_points=False, weight=None):
    weight = torch.randn(O, I) if weight is None else weight
    return PEQALinear(
        weight,
        torch.randn(len(weight)) if bias else None,
        bits=bits,
        group_size=group_size,
        train_zero_points=zero_points,
    )


def dense_reference(layer, scale=None, zero_point=None):
    """s (q - z) written out channel by channel, from codes decoded by a loop over bits."""
    scale = layer.weight_scale if scale is None else scale
    zero_point = layer.zero_point if zero_point is None else zero_point
    bits, group_size, _ = layer.layout
    codes = affine.unpack(layer.codes, bits, group_size * layer.weight_scale.shape[1])
    columns = []
    for i in range(layer.in_features):
        g = i // group_size
        columns.append(scale[:, g] * (codes[:, i].to(scale.dtype) - zero_point[:, g]))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bias", [True, False])
def test_output_equals_the_dense_layer_of_the_formula(bits, group_size, bias):
    layer = layer_of(group_size, bits=bits, bias=bias).double()
    x = torch.randn(2, 3, I, dtype=torch.float64)
    expected = F.linear(x, dense_reference(layer), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        layer.dense_weight(torch.float64), dense_reference(layer), rtol=0, atol=0
    )


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("group_size", GROUPS)
def test_gradients_are_right_in_float64(group_size, zero_points, monkeypatch):
    monkeypatch.setattr(affine, "_WEIGHTS_AT_ONCE", 5 * I)  # several parts, the last one smaller
    layer = layer_of(group_size, zero_points=zero_points).double()
    x = torch.randn(2, 3, I, dtype=torch.float64, requires_grad=True)
    trained = [getattr(layer, name) for name in layer.adapter_params()]

    def apply(x, *values):
        names = layer.adapter_params()
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(apply, (x, *trained))


@pytest.mark.parametrize("group_size", GROUPS)
def test_gradients_in_bfloat16_are_those_of_the_dense_layer(group_size):
    layer = layer_of(group_size, bias=True)
    x = torch.randn(64, I).bfloat16().requires_grad_()
    grad = torch.randn(64, O).bfloat16()
    layer(x).backward(grad)
    ours_x, ours_scale = x.grad, layer.weight_scale.grad
    assert (ours_x.dtype, ours_scale.dtype) == (torch.bfloat16, torch.float32)

    exact_x = x.detach().double().requires_grad_()
    scale = layer.weight_scale.detach().double().requires_grad_()
    F.linear(exact_x, dense_reference(layer, scale)).backward(grad.double())
    # Relative to the largest: a sum of rounded terms may cancel to nearly nothing.
    for ours, exact in ((ours_x, exact_x.grad), (ours_scale, scale.grad)):
        assert (ours - exact).abs().max() < 0.015 * exact.abs().max()


@pytest.mark.parametrize("group_size", GROUPS)
def test_only_the_scales_train(group_size):
    layer = layer_of(group_size, bias=True)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"weight_scale"}
    assert layer.adapter_params() == ["weight_scale"]
    layer = layer_of(group_size, bias=True, zero_points=True)
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"weight_scale", "zero_point"} == set(layer.adapter_params())


@pytest.mark.parametrize("group_size", GROUPS)
def test_codes_and_zero_points_are_the_same_bytes_after_training(group_size):
    layer = layer_of(group_size)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for _ in range(5):
        layer(torch.randn(8, I)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = layer.state_dict()
    assert torch.equal(after["codes"], before["codes"])
    assert torch.equal(after["zero_point"], before["zero_point"])
    assert (after["weight_scale"] != before["weight_scale"]).all()


def test_a_small_step_changes_every_scale():
    """1e-5 is lost in bf16, whose numbers near 0.3 are 1e-3 apart."""
    layer = layer_of()
    before = layer.weight_scale.detach().clone()
    optimizer = torch.optim.AdamW([layer.weight_scale], lr=1e-5, weight_decay=0.0)
    layer(torch.randn(8, I).bfloat16()).float().square().sum().backward()
    optimizer.step()
    change = (layer.weight_scale.detach() - before).abs()
    torch.testing.assert_close(change, torch.full_like(change, 1e-5), rtol=0.02, atol=0)
    assert torch.equal(before.bfloat16(), (before + 1e-5).bfloat16())


@pytest.mark.parametrize("group_size", GROUPS)
def test_recomputation_changes_no_gradient(group_size):
    layer = layer_of(group_size)
    x = torch.randn(6, I, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight_scale))
    recomputed = checkpoint(lambda x: layer(x).square().sum(), x, use_reentrant=False)
    again = torch.autograd.grad(recomputed, (x, layer.weight_scale))
    for ours, expected in zip(again, plain, strict=True):
        assert torch.equal(ours, expected)


def kept_for_backward(layer, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        y = layer(x)
    return y, saved


def test_per_channel_keeps_its_output_and_not_its_input():
    layer = layer_of()
    y, saved = kept_for_backward(layer, torch.randn(5, I, requires_grad=True))
    assert sorted(tuple(t.shape) for t in saved) == [(5, O), (O, 1)]
    assert any(t.data_ptr() == y.data_ptr() for t in saved)


@pytest.mark.parametrize("group_size", GROUPS)
def test_a_frozen_layer_keeps_neither_input_nor_output(group_size):
    layer = layer_of(group_size).requires_grad_(False)
    _, saved = kept_for_backward(layer, torch.randn(5, I, requires_grad=True))
    assert all(t.numel() <= layer.weight_scale.numel() for t in saved)


def test_scale_gradients_are_summed_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(affine, "_WEIGHTS_AT_ONCE", 4 * I)
    shapes = []
    original = peqa_linear.to_groups
    monkeypatch.setattr(
        peqa_linear, "to_groups", lambda g, size: shapes.append(g.shape) or original(g, size)
    )
    layer = layer_of(16)
    layer(torch.randn(5, I)).sum().backward()
    assert shapes == [(4, I), (4, I), (4, I), (2, I)]


def test_the_first_layer_needs_no_gradient_of_its_input():
    x = torch.randn(4, I)
    layer_of()(x).sum().backward()
    layer_of(16)(x).sum().backward()
    assert x.grad is None


def test_a_layer_of_zeros_stays_one():
    layer = layer_of(weight=torch.zeros(3, 8))
    x = torch.randn(4, 8, requires_grad=True)
    layer(x).sum().backward()
    assert not layer(x).any()
    assert torch.equal(layer.weight_scale.grad, torch.zeros(3, 1))
    assert torch.equal(x.grad, torch.zeros(4, 8))


@pytest.mark.parametrize("group_size", GROUPS)
def test_a_gradient_that_is_no_number_is_not_hidden(group_size):
    layer = layer_of(group_size)
    y = layer(torch.randn(4, I))
    y.backward(torch.full_like(y, float("nan")))
    assert layer.weight_scale.grad.isnan().all()


def test_a_scale_of_exactly_0_has_no_gradient_and_hides_none():
    layer = layer_of()
    with torch.no_grad():
        layer.weight_scale[3] = 0
    layer(torch.randn(4, I)).sum().backward()
    zero = layer.weight_scale.grad.squeeze(1) == 0
    assert zero.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", GROUPS)
def test_a_meta_layer_has_the_shapes_of_a_real_one(bits, group_size):
    def build(weight):
        return PEQALinear(weight, bits=bits, group_size=group_size)

    def shapes(layer):
        return {n: (t.shape, t.dtype) for n, t in layer.state_dict().items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 2 bits
        real, meta = build(torch.randn(O, I)), build(torch.empty(O, I, device="meta"))
        assert shapes(real) == shapes(meta)
        assert all(t.is_meta for t in meta.state_dict().values())
        weight = torch.randn(O, I)
        meta.quantize_(weight)
        for name, value in build(weight).state_dict().items():
            assert torch.equal(meta.state_dict()[name], value)


def test_state_dict_round_trip_is_exact():
    layer, other = layer_of(16), layer_of(16)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, I)
    assert torch.equal(layer(x), other(x))


def test_a_group_wider_than_the_row_is_the_row():
    weight = torch.randn(O, I)
    assert torch.equal(
        layer_of(I + 1, weight=weight).weight_scale, layer_of(None, weight=weight).weight_scale
    )


@pytest.mark.parametrize("shape", [(3, 5), (2, 700, 384), (1, 600_000)])
def test_scaling_in_parts_rounds_once(shape: tuple[int, ...]) -> None:
    values, weight_scale = torch.randn(shape).bfloat16(), torch.rand(shape[-1])
    expected = (values.float() * weight_scale).bfloat16()
    scaled = scale_columns_(values, weight_scale)
    assert scaled is values
    assert torch.equal(values, expected)


def test_codes_that_are_taken_over_compute_and_train_as_the_dense_weight_does() -> None:
    """Act-order: the columns of the codes are in another order than the input channels."""
    generator = torch.Generator().manual_seed(0)
    parts, dense = stored_formats.gptq(24, 64, generator, act_order=True, form="gptq_v2")
    stored = from_gptq(parts, bits=4, form="gptq_v2")
    layer = PEQALinear(torch.empty(24, 64, device="meta"), bits=4, group_size=16)
    layer.take_(stored)
    assert layer.layout.group_size == 32
    assert torch.equal(layer.dense_weight(torch.float32), dense)
    x = torch.randn(5, 64, requires_grad=True)
    plain = x.detach().clone().requires_grad_()
    scale = parts["scales"].float().requires_grad_()
    groups = parts["g_idx"].long()
    centred = dense / scale.detach()[groups].T
    expected = plain @ (scale[groups].T * centred).T
    layer(x).square().sum().backward()
    expected.square().sum().backward()
    # fp32 with its columns in another order.
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight_scale.grad, scale.grad.T, rtol=1e-4, atol=1e-4)
    layer.quantize_(dense)
    assert layer.input_order is None
