"""The low-rank matrix that gives back most of what rounding a weight has lost."""

from typing import NamedTuple

import torch

# What rounding loses is nearly noise, whose singular values fall slowly. Of what the exact product
# of rank 16 or 32 takes back of it, this takes back 99 % or more (weights of 576 x 192 to 576 x
# 1536), and 99.9 % where inputs of different sizes weigh it. With 4 and 16 it was 95 %.
ROUNDS = 8
OVERSAMPLING = 32
_SEED = 0
# Of the median's mean square: the least that a channel counts for. Not of the mean's: a few
# channels of large models are thousands of times as large as the others.
_FLOOR = 1e-4


class Factors(NamedTuple):
    """A product ``left right`` of ``[O, r]`` and ``[r, I]``."""

    left: torch.Tensor
    right: torch.Tensor


def repair_factors(error: torch.Tensor, mean_square: torch.Tensor, rank: int) -> Factors:
    r"""Approximate what rounding has taken from a weight, as its inputs weigh it.

    .. math:: L R = \arg\min_{\mathrm{rank}\,r} \lVert (E - L R)\,S \rVert_F, \qquad
        S_{ii} = \sqrt{\mathrm{mean}(x_i^2)}

    ``error`` is :math:`E = W - Q(W)`, ``[O, I]``; ``mean_square`` ``[I]`` is that of each input
    channel; both fp32. L R S are the first r singular triples of E S, so R is theirs over S, and
    what it makes of an input is of size one. A channel counts at least for 1/100 of a usual one,
    so that one which the calibration text leaves silent is neither divided by zero nor lost.

    Source: LQER (https://arxiv.org/abs/2402.02446), with the root of the mean square for its
    mean of magnitudes, and the error of any rounding.
    """
    scale = input_scale(mean_square)
    left, right = low_rank(error * scale, rank)
    # Contiguous, as a file gives them back: in another order of memory products round otherwise.
    return Factors(left.contiguous(), (right / scale).contiguous())


def input_scale(mean_square: torch.Tensor) -> torch.Tensor:
    """The diagonal of S, ``[I]``, up to a factor; of inputs that are all zero, ones."""
    usual = mean_square.median()
    usual = usual if usual > 0 else mean_square.mean()  # where a ReLU silences most channels
    return (mean_square / usual).clamp(min=_FLOOR).sqrt() if usual > 0 else mean_square + 1


def low_rank(matrix: torch.Tensor, rank: int) -> Factors:
    """Compute the first singular triples of ``[O, I]``, nearly; the values are in ``left``.

    Subspace iteration from random directions, which depend on the shape alone, orthogonalised at
    each product: algorithm 4.4 of https://arxiv.org/abs/0909.4061. It is exact if ``rank`` and
    the oversampling reach the smaller side. Not ``torch.svd_lowrank``, which draws on the matrix's
    device from the global generator: another device would give another backbone.
    """
    width = min(rank + OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(matrix.shape[1], width, generator=generator)  # equal on every device
    basis = _orthogonal(matrix @ start.to(matrix))
    for _ in range(ROUNDS):
        basis = _orthogonal(matrix @ _orthogonal(matrix.T @ basis))
    u, values, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return Factors((basis @ u[:, :rank]) * values[:rank], v[:rank])


def _orthogonal(columns: torch.Tensor) -> torch.Tensor:
    basis: torch.Tensor = torch.linalg.qr(columns).Q
    return basis
