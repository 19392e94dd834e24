"""Before Triton's kernels are used on a GPU they are compared there with the tables of a CPU."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from qst_tune.errors import first_line
from qst_tune.quantization import triton_decoding, triton_products
from qst_tune.quantization.affine import AffineLayout, dequantize_affine, quantize_affine
from qst_tune.quantization.nf4 import dequantize_nf4, quantize_nf4
from qst_tune.quantization.packing import pack

_ROWS, _COLUMNS = 48, 320
# Of the largest output, rounded once to bf16.
_LARGEST_ERROR = 8e-3


@torch.no_grad()
def find_fault(device: str) -> str | None:
    """Return what is wrong with the kernels on this device, or None."""
    try:
        with torch.device("cpu"):
            return next(_faults(device), None)
    except Exception as error:  # of Triton's compiler, of the driver, of any kind
        return f"{type(error).__name__}: {first_line(error)}"


def _faults(device: str) -> Iterator[str]:
    # No random numbers: those of a run stay the same.
    values = torch.arange(_ROWS * _COLUMNS, dtype=torch.float32).mul_(0.37).sin_().mul_(0.05)
    dense = values.view(_ROWS, _COLUMNS).to(torch.bfloat16)
    x = dense[:4].mul(20)
    weight = quantize_nf4(dense)
    there = weight.to(device)
    if not torch.equal(triton_decoding.decode_nf4(there).cpu(), dequantize_nf4(weight)):
        yield "NF4 weights are decoded to other values"
    for tokens in (x[:1], x):
        y = triton_products.nf4_product(tokens.to(device), there)
        yield from _product_fault("NF4", y, tokens, dequantize_nf4(weight))
    for bits in (4, 8):
        layout = AffineLayout(bits, 64, _COLUMNS)
        codes, scale, zero = quantize_affine(dense, bits=bits, group_size=64)
        packed = pack(codes, bits)
        decoded = dequantize_affine(packed, scale, zero, layout, dense.dtype)
        packed, scale, zero = packed.to(device), scale.to(device), zero.to(device)
        found = triton_decoding.decode_affine(packed, scale, zero, layout, dense.dtype)
        if not torch.equal(found.cpu(), decoded):
            yield f"weights of {bits} bits are decoded to other values"
        y = triton_products.affine_product(x[:1].to(device), packed, scale, zero, layout)
        yield from _product_fault(f"{bits}-bit", y, x[:1], decoded)


def _product_fault(
    name: str, y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor
) -> Iterator[str]:
    expected = F.linear(x.float(), dense.float())
    error = (y.cpu().float() - expected).abs().max() / expected.abs().max()
    if not error < _LARGEST_ERROR:
        yield f"{name} products of {len(x)} tokens are wrong by {float(error):.2g}"
