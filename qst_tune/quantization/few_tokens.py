"""Products of few tokens with 4-bit weights on a GPU: by the way that is the fastest there."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.quantization.fastest import fastest
from qst_tune.quantization.kernels import runs_triton
from qst_tune.quantization.nf4 import dequantize_nf4

if TYPE_CHECKING:
    from qst_tune.quantization.triton_products import Tile

_DTYPES = (torch.bfloat16, torch.float16)
# By device, dtype, shape of the weight, and whether it is for one token; None: decoding is faster.
_tiles: dict[tuple[Any, ...], "Tile | None"] = {}


def nf4_product(x: torch.Tensor, weight: NF4Tensor) -> torch.Tensor | None:
    """Multiply 1 to 16 tokens ``[..., I]`` with a weight ``[O, I]``; None: decode it first.

    The first product of each shape tries the kernels of :mod:`.triton_products` and takes the
    fastest, if one is faster than decoding; so it is for generation, where sums in another order
    from one process to the next do no harm. It has no gradient.
    """
    if not (x.is_cuda and x.dtype in _DTYPES and weight.dtype == x.dtype):
        return None
    if torch.compiler.is_compiling() or not runs_triton(weight.quantized_data, x.dtype):
        return None
    from qst_tune.quantization.triton_products import MOST_TOKENS, multiply_nf4, takes_nf4

    x_BI = x.reshape(-1, x.shape[-1])
    if not (0 < len(x_BI) <= MOST_TOKENS and takes_nf4(weight)):
        return None
    key = x.device, x.dtype, weight.shape, len(x_BI) == 1
    if key not in _tiles:
        if torch.cuda.is_current_stream_capturing():
            return None
        _tiles[key] = _fastest_tile(x_BI, weight)
    tile = _tiles[key]
    if tile is None:
        return None
    return multiply_nf4(x_BI, weight, tile).view(*x.shape[:-1], weight.shape[0])


def _fastest_tile(x_BI: torch.Tensor, weight: NF4Tensor) -> "Tile | None":
    from qst_tune.quantization.triton_products import (
        MATRIX_TILES,
        MOST_TOKENS,
        VECTOR_TILES,
        multiply_nf4,
    )

    is_vector = len(x_BI) == 1 and x_BI.dtype == torch.bfloat16
    tiles: Sequence[Tile] = VECTOR_TILES if is_vector else MATRIX_TILES
    # No random numbers: those of a run stay the same.
    shape = (1 if len(x_BI) == 1 else MOST_TOKENS, x_BI.shape[1])
    values = torch.arange(shape[0] * shape[1], device=x_BI.device, dtype=torch.float32)
    trial = values.mul_(0.37).sin_().view(shape).to(x_BI.dtype)
    ways = [partial(multiply_nf4, trial, weight, tile) for tile in tiles]
    index = fastest(lambda: F.linear(trial, dequantize_nf4(weight)), ways)
    return None if index is None else tiles[index]
