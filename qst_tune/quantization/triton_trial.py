"""Before Triton's kernels are used on a GPU they are compared there with the tables of a CPU."""

from collections.abc import Iterator

import torch

from qst_tune.errors import first_line
from qst_tune.quantization import triton_decoding
from qst_tune.quantization.affine import AffineLayout, dequantize_affine, quantize_affine
from qst_tune.quantization.nf4 import dequantize_nf4, quantize_nf4
from qst_tune.quantization.packing import pack

_ROWS, _COLUMNS = 48, 320


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
    weight = quantize_nf4(dense)
    found = triton_decoding.decode_nf4(weight.to(device)).cpu()
    if not torch.equal(found, dequantize_nf4(weight)):
        yield "NF4 weights are decoded to other values"
    for bits in (4, 8):
        layout = AffineLayout(bits, 64, _COLUMNS)
        codes, scale, zero = quantize_affine(dense, bits=bits, group_size=64)
        packed = pack(codes, bits)
        decoded = dequantize_affine(packed, scale, zero, layout, dense.dtype)
        packed, scale, zero = packed.to(device), scale.to(device), zero.to(device)
        found = triton_decoding.decode_affine(packed, scale, zero, layout, dense.dtype)
        if not torch.equal(found.cpu(), decoded):
            yield f"weights of {bits} bits are decoded to other values"
