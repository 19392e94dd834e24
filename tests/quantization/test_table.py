"""A quantised table is torchao's rounding, and computes as the dense weight it stands for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from qst_tune.quantization import table as module
from qst_tune.quantization.table import QuantizedTable, quantize_table

VOCAB, DIM = 61, 96
DTYPES = [torch.float32, torch.bfloat16]


def random_weight(dtype=torch.float32, dim=DIM):
    """Rows of very different sizes, a padding token's of zeros, an outlier."""
    weight = torch.randn(VOCAB, dim) * torch.logspace(-4, 1, VOCAB)[:, None]
    weight[7] = 0
    weight[11, 3] = 50
    return weight.to(dtype)


def int8_by_torchao(weight):
    """Symmetric rounding to nearest, a scale a row, to the same range: -127 to 127."""
    weight, block, limits = weight.float(), (1, weight.shape[1]), (-127, 127)
    scale, zero = choose_qparams_affine(
        weight, MappingType.SYMMETRIC, block, torch.int8, *limits, eps=1e-38
    )
    codes = quantize_affine(weight, block, scale, zero, torch.int8, *limits)
    return codes, dequantize_affine(codes, block, scale, zero, torch.int8, *limits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_torchaos_symmetric_rounding(dtype):
    weight = random_weight(dtype)
    table = quantize_table(weight)
    codes, dense = int8_by_torchao(weight)
    same = table.codes == codes
    ours = table.dense(torch.float32)
    torch.testing.assert_close(ours[same], dense[same], rtol=1e-6, atol=0)
    # torchao multiplies by 1 / s: a weight that lies between two codes may go to the other one.
    assert same.float().mean() > 0.98
    errors = (
        (ours - weight.float()).abs() / table.row_scale,
        (dense - weight).abs() / table.row_scale,
    )
    torch.testing.assert_close(*errors, rtol=0, atol=1e-4)
    assert table.row_scale.shape == (VOCAB, 1)


def test_no_weight_moves_further_than_half_a_step_of_its_row():
    weight = random_weight()
    error = (quantize_table(weight).dense() - weight).abs()
    assert (error <= 1.0001 / 254 * weight.abs().amax(1, keepdim=True)).all()
    assert not error[7].any(), "a row of zeros stays one"


# What an embedding and a head compute.


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embedding_looks_up_the_dense_rows(dtype):
    embedding = nn.Embedding(VOCAB, DIM, padding_idx=3, dtype=dtype)
    table = quantize_table(random_weight(dtype))
    embedding.weight = nn.Parameter(table, requires_grad=False)
    tokens = torch.randint(VOCAB, (2, 5))
    found = embedding(tokens)
    assert found.dtype == dtype
    assert torch.equal(found, F.embedding(tokens, table.dense()))
    assert embedding(tokens[:0]).shape == (0, 5, DIM)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 10 rows of 96, and a last one of 1."""
    monkeypatch.setitem(module.WEIGHTS_AT_ONCE, "cpu", 10 * DIM)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", [DIM, 32])
def test_a_linear_and_its_gradient_are_those_of_the_dense_weight(dim, bias):
    table = quantize_table(torch.randn(VOCAB, dim))
    dense = table.dense(torch.float64)
    shift = torch.randn(VOCAB, dtype=torch.float64) if bias else None
    x = torch.randn(2, 3, dim, dtype=torch.float64, requires_grad=True)
    y, expected = F.linear(x, table, shift), F.linear(x, dense, shift)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    grad = torch.randn_like(y)
    actual, wanted = (torch.autograd.grad(out, x, grad)[0] for out in (y, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(grad @ table, table.mixture(grad))


@pytest.mark.usefixtures("small_parts")
def test_bfloat16_products_are_as_near_as_those_of_a_dense_weight():
    table = quantize_table(torch.randn(VOCAB, DIM, dtype=torch.bfloat16))
    exact, dense = table.dense(torch.float64), table.dense()
    x = torch.randn(50, DIM, dtype=torch.bfloat16)
    shares = torch.rand(50, VOCAB, dtype=torch.bfloat16)

    def error(actual, expected):
        return ((actual.double() - expected).norm() / expected.norm()).item()

    scores, mixture = x.double() @ exact.T, shares.double() @ exact
    assert error(F.linear(x, table), scores) < 1.5 * error(F.linear(x, dense), scores)
    assert error(shares @ table, mixture) < 1.5 * error(shares @ dense, mixture)


class LargestFloat(TorchDispatchMode):
    """Records the largest number of elements of any floating-point tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            self.numel = max(self.numel, output.numel())
        return output


@pytest.mark.usefixtures("small_parts")
def test_the_dense_weight_never_exists():
    table = quantize_table(torch.randn(VOCAB, DIM))
    x = torch.randn(2, DIM, requires_grad=True)
    with LargestFloat() as largest:
        F.linear(x, table).sum().backward()
        F.embedding(torch.tensor([3, 4]), table)
    assert largest.numel == 10 * DIM


def test_quantising_copies_a_few_rows_at_a_time(monkeypatch):
    weight = random_weight(torch.bfloat16)
    whole = quantize_table(weight.float())
    monkeypatch.setattr(module, "row_parts", lambda n, d: (slice(i, i + 5) for i in range(0, n, 5)))
    with LargestFloat() as largest:
        table = quantize_table(weight, dtype=torch.float32)
    assert largest.numel <= 5 * DIM
    assert table.dtype == torch.float32
    assert torch.equal(table.codes, whole.codes)


# What else is done with a weight.


def test_copies_loads_and_moves_keep_the_format():
    weight = random_weight(torch.bfloat16)
    linear = nn.Linear(DIM, VOCAB, bias=False, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(quantize_table(weight), requires_grad=False)
    twin = copy.deepcopy(linear)
    twin.load_state_dict({"weight": weight[torch.arange(VOCAB).flip(0)]})
    assert torch.equal(twin.weight.dense(), linear.weight.dense().flip(0))
    twin.load_state_dict(linear.state_dict())
    twin.to(torch.float32)
    assert isinstance(twin.weight, QuantizedTable)
    assert isinstance(twin.weight, nn.Parameter)
    assert twin.weight.dtype == torch.float32
    torch.testing.assert_close(
        twin.weight.dense(), linear.weight.dense().float(), rtol=8e-3, atol=0
    )
    assert twin(torch.ones(1, DIM)).dtype == torch.float32


def test_what_needs_the_dense_weight_is_refused():
    table = quantize_table(torch.randn(4, 8))
    with pytest.raises(
        NotImplementedError, match=r"aten\.sum.* QuantizedTable: decode it with dense"
    ):
        table.sum()
    with pytest.raises(NotImplementedError, match="max_norm"):
        F.embedding(torch.tensor([1]), table, max_norm=1.0)


def test_on_meta_it_has_shapes_and_no_values():
    table = quantize_table(torch.empty(VOCAB, DIM, device="meta"))
    real = quantize_table(torch.randn(VOCAB, DIM))
    assert table.is_meta
    assert table.codes.is_meta
    for name in ("codes", "row_scale"):
        ours, theirs = getattr(table, name), getattr(real, name)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert repr(table) == "QuantizedTable((61, 96), torch.float32, meta)"
