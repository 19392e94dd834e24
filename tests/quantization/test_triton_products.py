"""Few tokens times a 4-bit weight, in the interpreter and on a GPU if any: the exact product."""

import pytest
import torch
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.quantization import few_tokens
from qst_tune.quantization.affine import AffineLayout, dequantize_affine, quantize_affine
from qst_tune.quantization.few_tokens import nf4_product
from qst_tune.quantization.nf4 import (
    absmax_unless_double_quantized,
    dequantize_nf4,
    nf4_from_parts,
    quantize_nf4,
)
from qst_tune.quantization.packing import pack
from tests.support.triton_compiler import compile_with_triton

pytest.importorskip("triton")
from qst_tune.quantization.triton_products import (
    MATRIX_TILES,
    VECTOR_TILES,
    multiply_integers,
    multiply_nf4,
    takes_integers,
    takes_nf4,
)

BF16, FP16 = torch.bfloat16, torch.float16
PARTS = ("quantized_scalers", "quantization_factor", "scaler_mean", "quantized_data", "nf4")
# One row; rows that end within a tile; columns of less than a tile, of one, of several and a rest.
SHAPES = [(1, 64), (13, 576), (37, 2048), (70, 1536), (5, 11008)]


@pytest.fixture
def device(triton_device):
    return triton_device


def moved(weight, device):
    return nf4_from_parts(weight.shape, [getattr(weight, part).to(device) for part in PARTS])


def check(found, x, weight, *, rounding):
    """Compare with the exact product: each result is rounded once, and the weight perhaps."""
    is_stored = isinstance(weight, NF4Tensor)
    dense = (dequantize_nf4(weight) if is_stored else weight).double()
    exact = x.double() @ dense.T
    found = found.cpu()
    assert (found.dtype, found.shape) == (x.dtype, exact.shape)
    # Roundings of the terms of a sum add up as a random walk.
    terms = (x.double().square() @ dense.square().T).sqrt()
    error = (found.double() - exact).abs()
    assert (error <= rounding * exact.abs() + 4 * rounding * terms + 1e-7).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", VECTOR_TILES)
def test_one_token_is_multiplied_with_the_weight(tile, shape, quant_type, device):
    weight = quantize_nf4((torch.randn(shape) * 0.02).to(BF16), quant_type)
    x = torch.randn(1, shape[1]).to(BF16)
    found = multiply_nf4(x.to(device), moved(weight, device), tile)
    check(found, x, weight, rounding=2**-8)


@pytest.mark.parametrize(("shape", "num_tokens"), list(zip(SHAPES, [3, 1, 16, 5, 2], strict=True)))
@pytest.mark.parametrize("tile", MATRIX_TILES)
def test_up_to_16_tokens_are_multiplied_with_the_weight(tile, shape, num_tokens, device):
    """The interpreter has no product of bf16: it multiplies the bits."""
    for dtype in (FP16, BF16) if device == "cuda" else (FP16,):
        weight = quantize_nf4((torch.randn(shape) * 0.02).to(dtype))
        x = torch.randn(num_tokens, shape[1]).to(dtype)
        found = multiply_nf4(x.to(device), moved(weight, device), tile)
        check(found, x, weight, rounding=2**-10 if dtype == FP16 else 2**-8)


INTEGERS = [(8, None), (8, 32), (8, 128), (4, None), (4, 32), (4, 64)]


@pytest.mark.parametrize(("bits", "group_size"), INTEGERS)
@pytest.mark.parametrize(("shape", "num_tokens"), [((37, 1024), 1), ((70, 256), 16), ((3, 768), 5)])
@pytest.mark.parametrize("tile", MATRIX_TILES)
def test_integers_are_multiplied_with_their_scales(
    tile, shape, num_tokens, bits, group_size, device
):
    dtypes = (FP16, BF16) if device == "cuda" else (FP16,)
    layout = AffineLayout(bits, group_size or shape[1], shape[1])
    dense = torch.randn(shape) * 0.02 + 0.01
    codes, scale, zero = quantize_affine(dense, bits=bits, group_size=layout.group_size)
    stored = [pack(codes, bits), scale, zero]
    assert takes_integers(stored[0], zero, layout)
    for dtype in dtypes:
        x = torch.randn(num_tokens, shape[1]).to(dtype)
        on_device = [part.to(device) for part in stored]
        found = multiply_integers(x.to(device), *on_device, layout, tile)
        weight = dequantize_affine(*stored, layout, dtype)
        check(found, x, weight, rounding=2**-10 if dtype == FP16 else 2**-8)


@pytest.mark.parametrize(
    ("bits", "group_size", "in_dim"), [(3, 64, 128), (4, 48, 96), (4, 64, 192), (8, None, 50)]
)
def test_integers_in_other_layouts_are_left_to_decoding(bits, group_size, in_dim):
    layout = AffineLayout(bits, group_size or in_dim, in_dim)
    codes, _, zero = quantize_affine(torch.randn(5, in_dim), bits=bits, group_size=group_size)
    assert not takes_integers(pack(codes, bits), zero, layout)


@pytest.mark.parametrize("has_map", [True, False])
@pytest.mark.parametrize("tile", [VECTOR_TILES[0], MATRIX_TILES[0]])
def test_scalers_of_other_programs_are_taken(tile, has_map, device):
    """bitsandbytes' 8-bit map, and absmax values in fp32."""
    dtype = BF16 if tile in VECTOR_TILES else FP16
    own = quantize_nf4(torch.randn(12, 256).to(dtype))
    blocks = own.numel() // own.block_size
    scalers = torch.randint(256, (blocks,), dtype=torch.uint8) if has_map else torch.rand(blocks)
    parts = [scalers, torch.rand(blocks // 16), torch.randn(257), own.quantized_data, own.nf4]
    weight = nf4_from_parts(own.shape, parts)
    x = torch.randn(1, 256).to(dtype)
    found = multiply_nf4(x.to(device), moved(weight, device), tile)
    check(found, x, weight, rounding=2**-8)
    assert absmax_unless_double_quantized(weight) is not None


@pytest.mark.parametrize("tile", [*VECTOR_TILES, MATRIX_TILES[0]])
def test_what_is_not_a_number_stays_in_its_token(tile, device):
    dtype = BF16 if tile in VECTOR_TILES else FP16
    weight = moved(quantize_nf4(torch.randn(9, 192).to(dtype)), device)
    x = torch.randn(1 if tile in VECTOR_TILES else 3, 192).to(dtype).to(device)
    x[-1, 70] = torch.nan
    found = multiply_nf4(x, weight, tile).cpu()
    assert found[-1].isnan().all()
    assert found[:-1].isfinite().all()


@pytest.mark.parametrize("shape", [(3, 96), (64, 32)])
def test_rows_that_are_not_of_whole_blocks_are_left_to_decoding(shape):
    assert not takes_nf4(quantize_nf4(torch.randn(shape).to(BF16)))
    assert takes_nf4(quantize_nf4(torch.randn(3, 128).to(BF16)))


def test_a_cpu_decodes_first():
    assert nf4_product(torch.randn(1, 128).to(BF16), quantize_nf4(torch.randn(3, 128))) is None


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qst_tune.quantization import triton_products as products

def compiled(kernel, dtype, tile, **constants):
    types = dict.fromkeys(kernel.arg_names, "*" + dtype)
    types |= {"x": "*i32", "codes": "*i32", "scalers": "*i8"}
    types |= {"weight_scale": "*fp32", "zero_point": "*u8"}
    types |= {n: "*fp32" for n in kernel.arg_names if n == "y" and "planes" in kernel.arg_names}
    sizes = "out_dim row_words num_groups num_tokens".split()
    types |= dict.fromkeys(sizes, "i32")
    constants |= {"ROWS": tile.rows, "WORDS": tile.words}
    types |= dict.fromkeys(constants, "constexpr")
    types = {name: types[name] for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = [n for n in kernel.arg_names if n not in constants and n != "num_tokens"]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, values, attrs)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile.warps})

def conversions(code):  # of a tile's layout, which pass values from thread to thread
    return code.asm["ttgir"].count("convert_layout")

for tile in products.VECTOR_TILES:
    code = compiled(products._multiply_one, "bf16", tile, SCALERS=256)
    assert conversions(code) < 16, conversions(code)
for tile in products.MATRIX_TILES:
    for dtype in ("bf16", "fp16"):
        code = compiled(products._multiply_some, dtype, tile, TOKENS=16, SCALERS=256)
        assert conversions(code) < 16 and code.metadata.shared < 99_000
    for integers in ({"BITS": 4, "GROUP_WORDS": 16}, {"BITS": 8, "GROUP_WORDS": 0}):
        code = compiled(products._multiply_integers, "bf16", tile, TOKENS=16, **integers)
        assert conversions(code) < 24 and code.metadata.shared < 99_000, conversions(code)
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100_and_keep_values_in_their_threads(tmp_path):
    compile_with_triton(COMPILE, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 16])
def test_a_gpu_multiplies_with_a_weight_of_7b(num_tokens):
    weight = quantize_nf4(torch.randn(11008, 4096, dtype=BF16, device="cuda").mul_(0.02))
    x = torch.randn(1, num_tokens, 4096, dtype=BF16, device="cuda")
    with torch.no_grad():
        found = nf4_product(x, weight)
    kind = torch.int8, *weight.shape
    assert (x.device, BF16, kind, num_tokens == 1) in few_tokens._tiles
    if found is not None:  # else decoding is faster there
        check(found[0], x[0].cpu(), moved(weight, "cpu"), rounding=2**-8)
