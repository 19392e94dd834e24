"""The fused kernels equal the modules they stand for: in the interpreter, and on a GPU if any."""

import pytest
import torch
import torch.nn.functional as F
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import RMSNorm, RotaryPositionalEmbeddings
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm as TransformersGemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tests.support.triton_compiler import compile_with_triton

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The order of a sum and the last bit of exp and rsqrt, and where that leads to another rounding one
# unit in the last place of 16 bits.
TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
}
SHAPES = [(1, 1, 40), (3, 2, 4, 16), (2, 4096)]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected, **TOLERANCE[expected.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("norm_type", "settings"),
    [
        (RMSNorm, {}),
        (GemmaRMSNorm, {"shift": 1.0}),
        (LlamaRMSNorm, {"rounds_first": True}),
        (TransformersGemmaRMSNorm, {"shift": 1.0}),
    ],
)
@torch.no_grad()
def test_a_norm_is_that_of_its_module(norm_type, settings, shape, dtype, triton_device):
    from qst_tune.modules.triton_kernels import rms_norm

    norm = norm_type(shape[-1], eps=1e-3).to(dtype)
    weight = next(norm.parameters()).normal_()
    x = torch.randn(shape).mul(3).to(dtype)
    found = rms_norm(x.to(triton_device), weight.to(triton_device), 1e-3, **settings)
    assert found.dtype == dtype
    close(found, norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope_type", [RotaryPositionalEmbeddings, Llama3ScaledRoPE])
@pytest.mark.parametrize("heads", [(3, 12), (1, 2)])
@pytest.mark.parametrize("positions", [None, "one for all rows", "per row", "no rows"])
def test_pairs_are_rotated_as_in_torchtune(positions, heads, rope_type, dtype, triton_device):
    from qst_tune.modules.triton_kernels import rotate_pairs

    rope = rope_type(heads[1], max_seq_len=9)
    x = torch.randn(2, 5, *heads).to(dtype)
    shape = {"one for all rows": (1, 5), "per row": (2, 5), "no rows": (5,)}
    where = None if positions is None else torch.randint(9, shape[positions])
    on_device = where if where is None else where.to(triton_device)
    found = rotate_pairs(x.to(triton_device), rope.cache.to(triton_device), on_device)
    close(found, rope(x, input_pos=where))


@pytest.mark.parametrize("position", [-1, 9])
def test_a_position_outside_of_the_table_gives_nan_and_touches_no_other(position, triton_device):
    from qst_tune.modules.triton_kernels import rotate_pairs

    rope = RotaryPositionalEmbeddings(8, max_seq_len=9)
    x, where = torch.randn(1, 3, 2, 8), torch.tensor([[4, position, 8]])
    found = rotate_pairs(*(t.to(triton_device) for t in (x, rope.cache, where))).cpu()
    assert found[:, 1].isnan().all()
    expected = rope(x, input_pos=where.clamp(0, 8))
    close(found[:, [0, 2]], expected[:, [0, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(3, 2, 12), (1, 1, 2)])
@pytest.mark.parametrize("table_rows", [1, 2])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_halves_are_rotated_as_in_transformers(
    is_transposed, table_rows, heads, dtype, triton_device
):
    from qst_tune.modules.triton_kernels import rotate_halves

    *numbers, head_dim = heads
    q, k = (
        torch.randn(2, 5, n, head_dim).to(dtype).transpose(1, 2)
        if is_transposed
        else torch.randn(2, n, 5, head_dim).to(dtype)
        for n in numbers
    )
    cos, sin = (torch.randn(table_rows, 5, head_dim).to(dtype) for _ in range(2))
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    tables = [table.to(triton_device) for table in (cos, sin)]
    for x, rotated in zip((q, k), expected, strict=True):
        close(rotate_halves(x.to(triton_device), *tables), rotated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(3, 100), (2, 5000), (1, 1)])
def test_a_gate_is_applied_in_its_own_place(shape, activation, dtype, triton_device):
    from qst_tune.modules.triton_kernels import gated

    gate, up = (torch.randn(shape).mul(4).to(dtype) for _ in range(2))
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    moved = gate.to(triton_device, copy=True)
    found = gated(moved, up.to(triton_device), activation)
    assert found is moved
    # The product's and the activation's roundings each.
    tolerance = {name: 2 * value for name, value in TOLERANCE[dtype].items()}
    torch.testing.assert_close(found.cpu(), act * up, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_of_one_product_are_gated_too(dtype, triton_device):
    from qst_tune.modules.triton_kernels import gated

    both = torch.randn(2, 3, 2 * 900).mul(2).to(dtype)
    gate, up = both.chunk(2, dim=-1)
    moved = both.to(triton_device, copy=True)
    found = gated(*moved.chunk(2, dim=-1))
    assert found.is_contiguous()
    assert torch.equal(moved.cpu(), both)
    tolerance = {name: 2 * value for name, value in TOLERANCE[dtype].items()}
    torch.testing.assert_close(found.cpu(), F.silu(gate) * up, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.3, None), (1.0, 5.0), (2.0, 30.0)])
@pytest.mark.parametrize("num_words", [7, 5000])  # a part of a tile, two tiles
def test_losses_and_gradient_are_those_of_autograd(num_words, scale, cap, dtype, triton_device):
    from qst_tune.modules.triton_kernels import cross_entropy_

    logits = torch.randn(4, num_words).mul(4).to(dtype)
    labels = torch.tensor([0, num_words - 1, 3, 3])
    leaf = logits.float().requires_grad_()
    z = leaf * scale
    z = z if cap is None else cap * torch.tanh(z / cap)
    expected = F.cross_entropy(z, labels, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    moved, there = logits.to(triton_device, copy=True), labels.to(triton_device)
    losses = cross_entropy_(moved, there, scale=scale, cap=cap, needs_grad=False)
    torch.testing.assert_close(losses.cpu(), expected.detach(), rtol=2e-6, atol=2e-6)
    assert torch.equal(moved.cpu(), logits)
    assert torch.equal(cross_entropy_(moved, there, scale=scale, cap=cap), losses)
    close(moved, gradient.to(dtype))


def test_logits_of_any_size_do_not_overflow(triton_device):
    from qst_tune.modules.triton_kernels import cross_entropy_

    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e38, -3e38, -3e38]])
    losses = cross_entropy_(logits.to(triton_device), torch.tensor([0, 1]).to(triton_device))
    torch.testing.assert_close(losses.cpu(), torch.tensor([1.0, 3.0]).log())


@pytest.mark.parametrize("label", [-100, 3])
def test_a_label_that_is_no_word_gives_nan(label, triton_device):
    from qst_tune.modules.triton_kernels import cross_entropy_

    logits = torch.zeros(2, 3, device=triton_device)
    losses = cross_entropy_(logits, torch.tensor([1, label], device=triton_device)).cpu()
    assert losses[1].isnan()
    torch.testing.assert_close(losses[0], torch.tensor(3.0).log())


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qst_tune.modules import triton_kernels as kernels

def ptx(kernel, sizes, floats="", **constants):
    types = dict.fromkeys(kernel.arg_names, "*" + sys.argv[1])
    types |= dict.fromkeys(sizes.split(), "i32") | dict.fromkeys(floats.split(), "fp32")
    types |= {"losses": "*fp32", "table": "*fp32", "labels": "*i64", "positions": "*i64"}
    types |= dict.fromkeys(constants, "constexpr")
    types = {name: types[name] for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", 90, 32)
    source = ASTSource(kernel, types, values)
    return compile(source, target=target, options=kernels._AS_TORCH).asm["ptx"]

texts = [
    ptx(kernels._rms_norm, "num_rows dim", "eps shift", ROUNDS_FIRST=first, ROWS=1, COLUMNS=4096)
    for first in (True, False)
]
sizes = "seq_len batch_stride max_len dim half"
texts += [
    ptx(kernels._rotate_pairs, sizes, PAIRS=2048, **more) for more in ({}, {"positions": None})
]
sizes = "seq_len num_heads half table_batch"
texts += [ptx(kernels._rotate_halves, sizes, HEADS=32, HALF=64)]
sizes = "num_values width gap"
texts += [
    ptx(kernels._gated, sizes, GELU=gelu, HAS_GAP=gelu, VALUES=2048) for gelu in (True, False)
]
assert not any("fma" in text for text in texts)
for cap in (True, False):
    constants = {"HAS_CAP": cap, "HAS_GRADIENT": True, "WORDS": 4096}
    ptx(kernels._cross_entropy, "num_words", "scale cap", **constants)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_kernels_compile_for_an_h100_and_round_where_torch_does(dtype, tmp_path):
    """Triton needs no GPU for that. An fma would leave the rounding of a product out."""
    compile_with_triton(COMPILE, tmp_path, dtype)
