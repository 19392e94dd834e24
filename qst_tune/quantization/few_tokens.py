"""Products of few tokens with quantised weights on a GPU: by the way that is the fastest there."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.quantization.affine import AffineLayout, dequantize_affine
from qst_tune.quantization.fastest import fastest
from qst_tune.quantization.kernels import runs_triton
from qst_tune.quantization.nf4 import dequantize_nf4
from qst_tune.quantization.waves import waves

if TYPE_CHECKING:
    from qst_tune.quantization.triton_products import Tile

_DTYPES = (torch.bfloat16, torch.float16)
MOST_TOKENS = 16
Multiply: TypeAlias = Callable[[torch.Tensor, "Tile | None"], torch.Tensor]
# By device, dtype, what the weight is, and whether it is for one token; None: decoding is faster.
_tiles: dict[tuple[object, ...], "Tile | None"] = {}


def nf4_product(x: torch.Tensor, weight: NF4Tensor) -> torch.Tensor | None:
    """Multiply 1 to 16 tokens ``[..., I]`` with a weight ``[O, I]``; None: decode it first.

    The first product of each shape tries the kernels of :mod:`.triton_products` and takes the
    fastest, if one is faster than decoding; so it is for generation, where sums in another order
    from one process to the next do no harm. It has no gradient.
    """
    if not _may_try(x, weight.quantized_data) or weight.dtype != x.dtype:
        return None
    from qst_tune.quantization import triton_products as kernels

    if not kernels.takes_nf4(weight):
        return None
    is_vector = x.numel() == x.shape[-1] and x.dtype == torch.bfloat16
    tiles = kernels.VECTOR_TILES if is_vector else kernels.MATRIX_TILES
    ways = partial(_nf4_ways, weight)
    return _product(x, (weight.quantized_scalers.dtype, *weight.shape), tiles, ways)


def integer_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor,
    layout: AffineLayout,
) -> torch.Tensor | None:
    """Do the same with a weight of integers; arguments as :func:`~.affine.dequantize_affine`'s."""
    if not _may_try(x, codes) or weight_scale.dtype != torch.float32:
        return None
    from qst_tune.quantization import triton_products as kernels

    if not kernels.takes_integers(codes, zero_point, layout):
        return None
    ways = partial(_integer_ways, codes, weight_scale.detach(), zero_point, layout)
    return _product(x, (len(codes), *layout), kernels.MATRIX_TILES, ways)


def _may_try(x: torch.Tensor, codes: torch.Tensor) -> bool:
    is_few = 0 < x.numel() <= MOST_TOKENS * x.shape[-1]
    if not (is_few and x.is_cuda and x.dtype in _DTYPES) or torch.compiler.is_compiling():
        return False
    return runs_triton(codes, x.dtype)


def _nf4_ways(weight: NF4Tensor, x_BI: torch.Tensor, tile: "Tile | None") -> torch.Tensor:
    from qst_tune.quantization.triton_products import multiply_nf4

    if tile is None:
        return F.linear(x_BI, dequantize_nf4(weight))
    return multiply_nf4(x_BI, weight, tile)


def _integer_ways(
    codes: torch.Tensor,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor,
    layout: AffineLayout,
    x_BI: torch.Tensor,
    tile: "Tile | None",
) -> torch.Tensor:
    from qst_tune.quantization.triton_products import multiply_integers

    stored = codes, weight_scale, zero_point, layout
    if tile is None:
        return F.linear(x_BI, dequantize_affine(*stored, x_BI.dtype))
    return multiply_integers(x_BI, *stored, tile)


def _product(
    x: torch.Tensor, kind: tuple[object, ...], tiles: Sequence["Tile"], multiply: Multiply
) -> torch.Tensor | None:
    """Multiply by the fastest tile; ``kind`` is what a weight has in common with others."""
    x_BI = x.reshape(-1, x.shape[-1])
    key = x.device, x.dtype, kind, len(x_BI) == 1
    if key not in _tiles:
        if torch.cuda.is_current_stream_capturing():
            return None
        _tiles[key] = _fastest_tile(x_BI, tiles, multiply)
    tile = _tiles[key]
    return None if tile is None else multiply(x_BI, tile).view(*x.shape[:-1], -1)


def _fastest_tile(x_BI: torch.Tensor, tiles: Sequence["Tile"], multiply: Multiply) -> "Tile | None":
    shape = (1 if len(x_BI) == 1 else MOST_TOKENS, x_BI.shape[1])
    trial = waves(*shape, dtype=x_BI.dtype, device=x_BI.device)
    ways = [partial(multiply, trial, tile) for tile in tiles]
    index = fastest(partial(multiply, trial, None), ways)
    return None if index is None else tiles[index]
