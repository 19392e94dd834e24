"""NF4 and FP4 with the scale of each block that loses the least of what inputs read.

The format's own scale is the largest magnitude of a block: that weight is exact, the others pay.
"""

import torch
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.quantization.nf4 import (
    QuantType,
    absmax_of_blocks,
    levels_of_codes,
    nf4_block_sizes,
    nf4_from_parts,
)

# Of a block's absmax: from 0.75 to 1.1, with 1 among them.
FACTORS = tuple((30 + k) / 40 for k in range(15))
# Weights at once: 4 MiB in fp32. With less, threads on busy cores wait longer for each other than
# the cache saves.
_AT_ONCE = 2**20
# The nearest level is looked up by the number's place on a grid from -2 to 2: 25 times as fast on a
# CPU as a search among the levels, and as good except within 6e-5 of the middle of two.
_PER_UNIT = 2**13
_REACH = 2


@torch.no_grad()
def quantize_nf4_weighed(
    weight: torch.Tensor, importance: torch.Tensor, quant_type: QuantType = "nf4"
) -> NF4Tensor:
    """Quantise ``[O, I]`` as ``quantize_nf4`` does, with the scales of :func:`searched_scales`.

    They are encoded in 8 bits as torchao encodes absmax values; then each weight takes the level
    nearest to it over its block's decoded scale. ``importance`` is fp32 ``[I]``.
    """
    weight = weight.detach().contiguous()
    scaler_block_size = nf4_block_sizes(weight.numel())[1]
    scales = searched_scales(weight, importance, quant_type).to(weight.dtype)
    # Blocks of one: torchao's absmax of each is the scale.
    scalers, factors, mean = NF4Tensor.double_quantize_scalers(scales, 1, scaler_block_size)
    levels = levels_of_codes(weight.dtype, quant_type).to(weight.device, copy=True)
    codes = torch.empty(weight.numel() // 2, dtype=torch.uint8, device=weight.device)
    quantized = nf4_from_parts(weight.shape, (scalers, factors.clone(), mean, codes, levels))
    _fill_codes(quantized, weight)
    return quantized


@torch.no_grad()
def searched_scales(
    weight: torch.Tensor, importance: torch.Tensor, quant_type: QuantType = "nf4"
) -> torch.Tensor:
    r"""Choose the scale of each block, fp32 ``[numel / K]``, among :data:`FACTORS` of its absmax a.

    .. math:: s = \arg\min_{s \in \{0.75 a, \ldots, 1.1 a\}}
        \sum_{k} m_k\,(w_k - s\,\mathrm{level}(w_k / s))^2

    m, fp32 ``[I]``, is the importance of the input that each weight multiplies: its mean square. Of
    equal errors the smallest scale is taken. Computed in fp32, some blocks at a time.
    """
    size = nf4_block_sizes(weight.numel())[0]
    levels = levels_of_codes(weight.dtype, quant_type).to(weight.device).float()
    table = levels[_codes_on_grid(levels)]
    blocks, chosen = weight.reshape(-1, size), []
    for start in range(0, len(blocks), at_once := _AT_ONCE // size):
        part = blocks[start : start + at_once].float()
        position = torch.arange(part.numel(), device=weight.device).add_(start * size)
        chosen.append(_best(part, importance[position % weight.shape[1]].view_as(part), table))
    return torch.cat(chosen)


def _best(blocks: torch.Tensor, importance: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    absmax = blocks.abs().amax(1)
    unit = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    best, least = torch.ones_like(absmax), torch.full_like(absmax, torch.inf)
    for factor in FACTORS:
        scaled = unit / factor
        decoded = torch.index_select(table, 0, _place(scaled)).view_as(unit)
        error = decoded.sub_(scaled).square_().mul_(importance).sum(1).mul_(factor**2)
        best, least = torch.where(error < least, factor, best), torch.minimum(error, least)
    return best.mul_(absmax)


def _place(scaled: torch.Tensor) -> torch.Tensor:
    """The index of each number on the grid, flat."""
    middle = _REACH * _PER_UNIT + 0.5  # a half, since int cuts
    return scaled.mul(_PER_UNIT).add_(middle).int().flatten()


def _codes_on_grid(levels: torch.Tensor) -> torch.Tensor:
    """The code of the level nearest to each number of the grid; of two, the first."""
    end = _REACH * _PER_UNIT
    grid = torch.arange(-end, end + 1, device=levels.device) / _PER_UNIT
    return (grid.unsqueeze(1) - levels).abs().argmin(1)


def _fill_codes(quantized: NF4Tensor, weight: torch.Tensor) -> None:
    """Give each weight the level nearest to it over its block's decoded scale."""
    size, table = quantized.block_size, _codes_on_grid(quantized.nf4.float()).to(torch.uint8)
    blocks, pairs = weight.view(-1, size), quantized.quantized_data.view(-1, size // 2)
    scales = absmax_of_blocks(quantized).float().unsqueeze(1)
    parts = (tensor.split(_AT_ONCE // size) for tensor in (blocks, scales, pairs))
    for part, scale, out in zip(*parts, strict=True):
        # A scale that 8 bits have made zero stands for zeros, whatever the level.
        scaled = (part.float() / scale).nan_to_num_(0).clamp_(-_REACH, _REACH)
        codes = torch.index_select(table, 0, _place(scaled)).view_as(part)
        out.copy_(codes[:, ::2] << 4 | codes[:, 1::2])
