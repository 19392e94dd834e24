"""Whichever of torchtune's kinds a loss is, the number is the mean over labels."""

import math

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.modules import TiedLinear
from torchtune.modules.loss import CEWithChunkedOutputLoss

from qst_tune.data.batches.collate import align_labels
from qst_tune.errors import UserError
from qst_tune.models import qst_decoder
from qst_tune.modules import fused_layers
from qst_tune.modules import loss as loss_module
from qst_tune.modules.loss import LinearCrossEntropyLoss, connect_loss, next_token_loss
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.scaled_head import ScaledHead
from qst_tune.quantization.table import quantize_table
from qst_tune.training.language_modelling import build_loss
from tests.support.numbers import TINY, TINY_REDUCTION, random_tokens, randomize_, tiny_backbone

LOSSES = [LinearCrossEntropyLoss, CEWithChunkedOutputLoss, nn.CrossEntropyLoss]
IGNORED = -100


def model_and_batch():
    model = qst_decoder(tiny_backbone(), reduction_factor=TINY_REDUCTION, rank=4)
    randomize_(model.side)
    tokens = random_tokens(batch=2, length=11)
    labels = tokens.clone()
    labels[0, :5] = IGNORED
    labels[1, 8:] = IGNORED
    return model, {"tokens": tokens, "labels": align_labels(labels)}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradient_are_those_of_cross_entropy(loss_type) -> None:
    model, batch = model_and_batch()
    logits = model(batch["tokens"])
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    expected_grads = torch.autograd.grad(expected, list(model.side.parameters()))

    loss = loss_type()
    connect_loss(loss, model)
    actual, num_labels = next_token_loss(model, loss, batch)
    grads = torch.autograd.grad(actual, list(model.side.parameters()))

    assert num_labels.item() == 6 + 7  # positions 5 to 10 of row 0, 1 to 7 of row 1
    # fp32 sums over 13 tokens in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    for actual_grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_batch_without_labels_has_loss_and_gradient_zero(loss_type) -> None:
    model, batch = model_and_batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    loss = loss_type()
    connect_loss(loss, model)
    value, num_labels = next_token_loss(model, loss, batch)
    value.backward()
    assert (value.item(), num_labels.item()) == (0.0, 0)
    assert all(p.grad is None or not p.grad.any() for p in model.side.parameters())


def test_batch_is_left_as_it_was() -> None:
    model, batch = model_and_batch()
    before = {key: value.clone() for key, value in batch.items()}
    next_token_loss(model, nn.CrossEntropyLoss(), batch)
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[key], before[key]) for key in batch)


def test_build_loss_refuses_what_ignores_no_label() -> None:
    build_loss(OmegaConf.create({"_component_": "torch.nn.CrossEntropyLoss"}))
    with pytest.raises(UserError, match=r"torch\.nn\.MSELoss has no ignore_index.*LinearCrossEnt"):
        build_loss(OmegaConf.create({"_component_": "torch.nn.MSELoss"}))


DIM, VOCAB = 24, 61


class SoftCapped(nn.Module):
    """A head that is more than a matrix product, as Gemma 2's."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return 5.0 * torch.tanh(self.linear(x) / 5.0)


def build_head(kind, dtype=torch.float32):
    embedding = nn.Embedding(VOCAB, DIM, dtype=dtype)
    linear = nn.Linear(DIM, VOCAB, bias=kind == "biased", dtype=dtype)
    head = {
        "linear": linear,
        "biased": linear,
        "tied": TiedLinear(embedding),
        "int8 table": linear,
        "nf4": NF4Linear(torch.randn(VOCAB + 1, DIM, dtype=dtype)),
        "soft_capped": SoftCapped(linear),
    }[kind]
    for module in (embedding, linear):
        module.requires_grad_(False)
    if kind == "int8 table":
        linear.weight = nn.Parameter(quantize_table(linear.weight), requires_grad=False)
    return head


def loss_over(head, **arguments):
    class Model:
        output = head
        skip_output_layer = False

    loss = LinearCrossEntropyLoss(**arguments)
    loss.set_model_output(model := Model())
    assert model.skip_output_layer
    return loss


def hidden_and_labels(shape=(3, 7), dtype=torch.float32, ignored=0.3):
    hidden = torch.randn(*shape, DIM, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCAB, shape)
    labels[torch.rand(shape) < ignored] = IGNORED
    return hidden, labels


def whole_cross_entropy(hidden, labels, head, dtype=torch.float32):
    logits = head(hidden).to(dtype)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def loss_and_gradient(function, hidden):
    leaf = hidden.detach().clone().requires_grad_()
    loss = function(leaf)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 10_000])
@pytest.mark.parametrize("kind", ["linear", "tied", "biased", "nf4", "int8 table", "soft_capped"])
def test_loss_and_gradient_equal_those_of_whole_logits(kind, chunk_tokens):
    head = build_head(kind)
    hidden, labels = hidden_and_labels()
    chunked = loss_over(head, chunk_tokens=chunk_tokens)
    loss, grad = loss_and_gradient(lambda h: chunked(h, labels), hidden)
    expected, expected_grad = loss_and_gradient(
        lambda h: whole_cross_entropy(h, labels, head), hidden
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)
    assert not grad[labels == IGNORED].any()


@pytest.mark.parametrize("kind", ["linear", "tied", "biased", "nf4", "int8 table", "soft_capped"])
def test_bfloat16_is_as_near_to_the_exact_result_as_whole_logits_are(kind):
    head = build_head(kind, torch.bfloat16)
    hidden, labels = hidden_and_labels((4, 32), torch.bfloat16)
    chunked = loss_over(head, chunk_tokens=50)
    loss, grad = loss_and_gradient(lambda h: chunked(h, labels), hidden)
    whole, whole_grad = loss_and_gradient(lambda h: whole_cross_entropy(h, labels, head), hidden)
    assert (loss.dtype, grad.dtype) == (torch.float32, torch.bfloat16)
    # Both round the logits alike and differ in where the gradient is rounded to bf16 (2^-8):
    # 0.005 in norm at most.
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=1e-6)
    difference = (grad.float() - whole_grad.float()).norm() / whole_grad.float().norm()
    assert difference < 0.01


def test_float64_is_computed_to_fp32_accuracy():
    head = build_head("linear", torch.float64)
    hidden, labels = hidden_and_labels(dtype=torch.float64)
    chunked = loss_over(head, chunk_tokens=4)
    loss, grad = loss_and_gradient(lambda h: chunked(h, labels), hidden)
    expected, expected_grad = loss_and_gradient(
        lambda h: whole_cross_entropy(h, labels, head, torch.float64), hidden
    )
    assert (loss.dtype, grad.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["linear", "biased"])
def test_the_gradient_is_the_slope_of_the_loss(kind):
    """Central differences, independent of anyone's cross entropy."""
    head = build_head(kind, torch.float64)
    hidden, labels = hidden_and_labels((5,), torch.float64)
    chunked = loss_over(head, chunk_tokens=2)
    _, grad = loss_and_gradient(lambda h: chunked(h, labels), hidden)
    direction = torch.randn_like(hidden)
    step = 1e-2  # the loss is fp32, so a smaller step would measure its rounding
    with torch.no_grad():
        rise = chunked(hidden + step * direction, labels) - chunked(
            hidden - step * direction, labels
        )
    slope = (grad * direction).sum().item()
    assert rise.item() / (2 * step) == pytest.approx(slope, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("kind", ["linear", "biased"])
def test_all_tokens_ignored_gives_zero_loss_and_zero_gradient(kind):
    hidden, labels = hidden_and_labels(ignored=1.1)
    chunked = loss_over(build_head(kind))
    loss, grad = loss_and_gradient(lambda h: chunked(h, labels), hidden)
    assert loss.item() == 0
    assert grad.shape == hidden.shape
    assert not grad.any()


def test_another_ignore_index_is_respected():
    head = build_head("linear")
    hidden, labels = hidden_and_labels()
    renamed = labels.clone()
    renamed[labels == IGNORED] = 3
    renamed[labels == 3] = 4
    labels[labels == 3] = 4
    loss = loss_over(head, ignore_index=3)(hidden, renamed)
    torch.testing.assert_close(loss, loss_over(head)(hidden, labels), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["linear", "biased", "soft_capped"])
@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_extreme_logits_give_finite_and_right_results(magnitude, kind):
    """exp(1e4) is infinite in any floating-point type."""
    head = build_head(kind)
    hidden, labels = hidden_and_labels()
    scale = magnitude / head(hidden).abs().max().item() if kind != "soft_capped" else magnitude
    extreme = (hidden * scale).detach()
    chunked = loss_over(head, chunk_tokens=4)
    loss, grad = loss_and_gradient(lambda h: chunked(h, labels), extreme)
    expected, expected_grad = loss_and_gradient(
        lambda h: whole_cross_entropy(h, labels, head), extreme
    )
    assert loss.isfinite()
    assert grad.isfinite().all()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)


def test_a_certain_prediction_costs_nothing_and_a_wrong_one_its_logit():
    """By hand: logits (1e4, 0, 0, ...)."""
    head = nn.Linear(2, VOCAB, bias=False).requires_grad_(False)
    nn.init.zeros_(head.weight)
    head.weight[0, 0] = 1e4
    hidden = torch.tensor([[1.0, 0.0]])
    loss = loss_over(head)
    assert loss(hidden, torch.tensor([0])).item() == 0
    assert loss(hidden, torch.tensor([5])).item() == 1e4
    assert loss(torch.zeros(1, 2), torch.tensor([5])).item() == pytest.approx(math.log(VOCAB))


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        tensors = output if isinstance(output, (tuple, list)) else [output]
        sizes = [t.numel() for t in tensors if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return output


@pytest.mark.parametrize("kind", ["linear", "tied", "biased", "soft_capped"])
def test_no_tensor_of_all_logits_ever_exists(kind):
    head = build_head(kind)
    hidden, labels = hidden_and_labels((4, 64))
    chunk_tokens = 32
    chunked = loss_over(head, chunk_tokens=chunk_tokens)
    with LargestTensor() as whole:
        loss_and_gradient(lambda h: whole_cross_entropy(h, labels, head), hidden)
    assert whole.numel == labels.numel() * VOCAB
    with LargestTensor() as largest:
        loss_and_gradient(lambda h: chunked(h, labels), hidden)
    assert largest.numel <= max(chunk_tokens * VOCAB, hidden.numel())


def test_ignored_tokens_never_reach_the_head():
    seen = []
    head = build_head("biased")
    head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    hidden, labels = hidden_and_labels((4, 16), ignored=0.8)
    loss_over(head, chunk_tokens=3)(hidden, labels)
    assert sum(seen) == (labels != IGNORED).sum()
    assert max(seen) == 3


class MatmulCount(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["linear", "biased"])
def test_without_grad_the_loss_is_the_same_and_no_gradient_is_computed(kind):
    head = build_head(kind)
    hidden, labels = hidden_and_labels((3, 4), ignored=0)
    chunked = loss_over(head, chunk_tokens=4)
    with MatmulCount() as with_gradient:
        expected = chunked(hidden, labels).detach()
    with MatmulCount() as without_gradient, torch.no_grad():
        loss = chunked(hidden, labels)
    assert not loss.requires_grad
    assert torch.equal(loss, expected)
    assert torch.equal(chunked(hidden.detach(), labels), expected)
    assert (with_gradient.calls, without_gradient.calls) == (6, 3)


@pytest.mark.parametrize("kind", ["linear", "biased"])
@pytest.mark.parametrize("factor", [0.25, -3.0])
def test_a_scaled_loss_scales_the_gradient(factor, kind):
    """As gradient accumulation does; then two backward passes add up."""
    head = build_head(kind)
    hidden, labels = hidden_and_labels()
    chunked = loss_over(head, chunk_tokens=4)
    _, grad = loss_and_gradient(lambda h: chunked(h, labels), hidden)
    (chunked(hidden, labels) * factor).backward()
    torch.testing.assert_close(hidden.grad, grad * factor, rtol=1e-6, atol=0)
    (chunked(hidden, labels) * factor).backward()
    torch.testing.assert_close(hidden.grad, 2 * grad * factor, rtol=1e-6, atol=0)


def test_the_gradient_reaches_the_parameters_before_the_head():
    head = build_head("linear")
    before = nn.Linear(DIM, DIM)
    hidden, labels = hidden_and_labels()
    loss_over(head, chunk_tokens=4)(before(hidden), labels).backward()
    grads = [parameter.grad.clone() for parameter in before.parameters()]
    before.zero_grad()
    whole_cross_entropy(before(hidden), labels, head).backward()
    for grad, parameter in zip(grads, before.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_it_works_with_a_model_and_leaves_its_state_dict_alone(tied):
    model = qst_decoder(tiny_backbone(tied=tied), reduction_factor=4)
    nn.init.normal_(model.side.upsample.weight)
    tokens = random_tokens(length=8)
    labels = random_tokens(length=8)
    logits = model(tokens)
    keys = list(model.state_dict())
    loss = LinearCrossEntropyLoss(chunk_tokens=5)
    loss.set_model_output(model)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss(model(tokens), labels), expected, rtol=1e-6, atol=1e-6)
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert list(model.state_dict()) == keys
    assert logits.shape[-1] == TINY["vocab_size"]


def test_use_before_set_model_output_is_refused():
    with pytest.raises(RuntimeError, match="call set_model_output"):
        LinearCrossEntropyLoss()(*hidden_and_labels())


@pytest.mark.parametrize("chunk_tokens", [0, -1])
def test_an_empty_chunk_is_refused(chunk_tokens):
    with pytest.raises(ValueError, match="must be at least 1"):
        LinearCrossEntropyLoss(chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("scale_and_cap", [None, (0.5, None), (1.0, 2.0)])
@pytest.mark.parametrize("kind", ["linear", "biased", "tied", "int8 table"])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_in_triton_kernels_the_loss_and_its_gradient_are_those_of_whole_logits(
    ignored, kind, scale_and_cap, monkeypatch, triton_device
):
    monkeypatch.setattr(fused_layers, "runs_fused", lambda x: True)
    head = build_head(kind)
    getattr(head, "tied_module", head).to(triton_device)
    if scale_and_cap:
        head = ScaledHead(head, *scale_and_cap)
    hidden, labels = hidden_and_labels(ignored=ignored)
    hidden, labels = hidden.detach().to(triton_device), labels.to(triton_device)
    chunked = loss_over(head, chunk_tokens=4)
    number = int((labels != IGNORED).sum())
    expected, gradient = loss_and_gradient(lambda h: whole_cross_entropy(h, labels, head), hidden)
    for num_labels in (None, number):
        loss, found = loss_and_gradient(lambda h, n=num_labels: chunked(h, labels, n), hidden)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_a_head_that_is_no_product_is_left_to_autograd_with_the_kernels_too(
    monkeypatch, triton_device
):
    head = build_head("soft_capped").to(triton_device)
    hidden, labels = (t.to(triton_device) for t in hidden_and_labels())
    expected = loss_and_gradient(lambda h: whole_cross_entropy(h, labels, head), hidden)
    monkeypatch.setattr(fused_layers, "runs_fused", lambda x: True)
    found = loss_and_gradient(lambda h: loss_over(head)(h, labels), hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("words", "tokens"), [(100, 671_088 // 256 * 256), (10**7, 256)])
def test_the_kernel_takes_as_many_tokens_as_have_128_mib_of_logits(words, tokens, monkeypatch):
    monkeypatch.setattr(fused_layers, "runs_fused", lambda x: True)
    head = nn.Linear(8, words, bias=False, device="meta", dtype=torch.bfloat16)
    hidden = torch.zeros(1, 8, dtype=torch.bfloat16)
    assert loss_module._chunk_tokens(hidden, head) == tokens
    monkeypatch.setattr(fused_layers, "runs_fused", lambda x: False)
    assert loss_module._chunk_tokens(hidden, head) == 256


def test_backward_runs_once():
    hidden, labels = hidden_and_labels()
    loss = loss_over(build_head("linear"))(hidden, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()
