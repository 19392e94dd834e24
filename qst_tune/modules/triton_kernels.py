r"""Triton kernels for what a frozen model computes between its products: each reads memory once.

==================  =================================================================
``rms_norm``        :math:`w \odot x / \sqrt{\mathrm{mean}(x^2) + \epsilon}`
``rotate_pairs``    rotary embedding of neighbouring channels, as torchtune's
``rotate_halves``   rotary embedding of channels half a head apart, as transformers'
``gated``           :math:`\mathrm{act}(a) \odot b`, in the place of a
``cross_entropy_``  below, twice over a row of logits, in their place
==================  =================================================================

They compute in fp32 and round where the modules they stand for do; the results differ from theirs
by the order of sums and the last bit of functions. None of them has a gradient. For
a row of logits x with label t, a scale s and perhaps a soft cap c the last one computes

.. math::
    z = c\,\tanh(s x / c), \qquad \ell = \log \sum_v e^{z_v} - z_t, \qquad
    \frac{\partial \ell}{\partial x_v} = s\,(1 - z_v^2 / c^2)\,(\mathrm{softmax}(z)_v - [v = t])

first the maximum and the sum together, as `Liger <https://arxiv.org/abs/2410.10989>`_'s loss does.
"""

import math
from typing import Literal, TypeAlias

import torch
import triton
import triton.language as tl

Activation: TypeAlias = Literal["silu", "gelu_tanh"]
_VALUES_AT_ONCE = 2048
_WORDS_AT_ONCE = 4096
# Else a product is fused with the sum behind it, without the rounding between them.
_AS_TORCH = {"enable_fp_fusion": False}


@triton.jit
def _rms_norm(
    x, weight, y, eps, num_rows, dim, shift,
    ROUNDS_FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < dim)
    h = tl.load(x + row * dim + column, mask=inside, other=0).to(tl.float32)
    h *= tl.rsqrt(tl.sum(h * h, axis=1, keep_dims=True) / dim + eps)
    if ROUNDS_FIRST:
        h = h.to(y.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight + column, mask=column < dim, other=0).to(tl.float32) + shift
    tl.store(y + row * dim + column, (h * scale).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_pairs(
    x, table, positions, y, seq_len, batch_stride, max_len, dim, half, PAIRS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = token % seq_len
    if positions is not None:
        position = tl.load(positions + (token // seq_len) * batch_stride + position)
    pair, value = tl.arange(0, PAIRS), tl.arange(0, 2 * PAIRS)
    entry = position * half + pair % half
    # A position outside of the table must not pass unseen: it makes the loss NaN.
    is_known = (entry >= 0) & (entry < max_len * half) & (2 * pair < dim)
    cos = tl.load(table + 2 * entry, mask=is_known, other=float("nan"))
    sin = tl.load(table + 2 * entry + 1, mask=is_known, other=float("nan"))
    h = tl.load(x + token * dim + value, mask=value < dim, other=0).to(tl.float32)
    first, second = tl.split(tl.reshape(h, (PAIRS, 2)))
    turned = tl.interleave(first * cos - second * sin, second * cos + first * sin)
    tl.store(y + token * dim + value, turned.to(y.dtype.element_ty), mask=value < dim)


@triton.jit
def _rotate_halves(
    x, cos, sin, y, seq_len, num_heads, half, table_batch,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    dtype = y.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < num_heads) & (channel < half)
    angle = (token // seq_len) * table_batch + (token % seq_len) * 2 * half + channel
    value = (token * num_heads + head) * 2 * half + channel
    first = tl.load(x + value, mask=inside, other=0).to(tl.float32)
    second = tl.load(x + value + half, mask=inside, other=0).to(tl.float32)
    known = channel < half
    cos_1 = tl.load(cos + angle, mask=known, other=0).to(tl.float32)
    cos_2 = tl.load(cos + angle + half, mask=known, other=0).to(tl.float32)
    sin_1 = tl.load(sin + angle, mask=known, other=0).to(tl.float32)
    sin_2 = tl.load(sin + angle + half, mask=known, other=0).to(tl.float32)
    y_1 = (first * cos_1).to(dtype).to(tl.float32) + (-second * sin_1).to(dtype).to(tl.float32)
    y_2 = (second * cos_2).to(dtype).to(tl.float32) + (first * sin_2).to(dtype).to(tl.float32)
    tl.store(y + value, y_1.to(dtype), mask=inside)
    tl.store(y + value + half, y_2.to(dtype), mask=inside)


@triton.jit
def _gated(
    gate, up, y, num_values, width, gap,
    HAS_GAP: tl.constexpr, GELU: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    dtype = gate.dtype.element_ty
    value = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    inside = value < num_values
    place = value
    if HAS_GAP:
        place += value // width * gap
    a = tl.load(gate + place, mask=inside, other=0).to(tl.float32)
    b = tl.load(up + place, mask=inside, other=0).to(tl.float32)
    slope = 1.0
    if GELU:  # 1/2 (1 + tanh(u)) = sigmoid(2 u)
        slope = 1.5957691216057308 * (1.0 + 0.044715 * a * a)
    active = (a / (1.0 + tl.exp(-a * slope))).to(dtype).to(tl.float32)
    tl.store(y + value, (active * b).to(dtype), mask=inside)


@triton.jit
def _capped(x, scale, cap, HAS_CAP: tl.constexpr):
    z = x.to(tl.float32) * scale
    if HAS_CAP:
        z = cap * (2.0 / (1.0 + tl.exp(-2.0 * z / cap)) - 1.0)
    return z


@triton.jit
def _cross_entropy(
    logits, labels, losses, num_words, scale, cap,
    HAS_CAP: tl.constexpr, HAS_GRADIENT: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * num_words
    label = tl.load(labels + row)
    # As positions: a label that is no word makes the loss NaN.
    is_word = (label >= 0) & (label < num_words)
    target = _capped(tl.load(x + label, mask=is_word, other=float("nan")), scale, cap, HAS_CAP)
    largest = float("-inf")
    total = 0.0
    for start in range(0, num_words, WORDS):
        word = start + tl.arange(0, WORDS)
        inside = word < num_words
        z = _capped(tl.load(x + word, mask=inside, other=0), scale, cap, HAS_CAP)
        z = tl.where(inside, z, float("-inf"))
        before, largest = largest, tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest), axis=0)
    tl.store(losses + row, tl.log(total) + (largest - target))
    if HAS_GRADIENT:
        tl.debug_barrier()  # the label's logit is read before it is overwritten
        for start in range(0, num_words, WORDS):
            word = start + tl.arange(0, WORDS)
            inside = word < num_words
            z = _capped(tl.load(x + word, mask=inside, other=0), scale, cap, HAS_CAP)
            gradient = tl.exp(z - largest) / total - tl.where(word == label, 1.0, 0.0)
            if HAS_CAP:
                gradient *= 1.0 - (z / cap) * (z / cap)
            tl.store(x + word, (gradient * scale).to(logits.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    shift: float = 0.0,
    rounds_first: bool = False,
) -> torch.Tensor:
    """Normalise ``x``, ``[..., D]``; the weight ``[D]`` is ``weight + shift``.

    ``rounds_first``: to the dtype of ``x`` before the product with the weight too.
    """
    x, dim = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    columns = triton.next_power_of_2(dim)
    rows = max(1, _VALUES_AT_ONCE // columns)
    num_rows = x.numel() // dim
    with torch.cuda.device_of(x):
        _rms_norm[(triton.cdiv(num_rows, rows),)](
            x, weight, y, eps, num_rows, dim, shift,
            ROUNDS_FIRST=rounds_first, ROWS=rows, COLUMNS=columns,
            num_warps=_num_warps(rows * columns), **_AS_TORCH,
        )  # fmt: skip
    return y


def rotate_pairs(
    x: torch.Tensor, table: torch.Tensor, input_pos: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotate ``x``, ``[B, T, heads, H]``, by ``table``, fp32 ``[positions, H / 2, 2]``: cos, sin.

    ``input_pos``, ``[B, T]``, ``[1, T]`` or ``[T]``; None: a token's position is its index. Where
    the table has no such position, the result is NaN.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    batch_size, seq_len, num_heads, head_dim = x.shape
    dim = num_heads * head_dim
    positions = None if input_pos is None else input_pos.contiguous()
    batch_stride = seq_len if positions is not None and positions.numel() > seq_len else 0
    pairs = triton.next_power_of_2(dim) // 2
    with torch.cuda.device_of(x):
        _rotate_pairs[(batch_size * seq_len,)](
            x, table, positions, y, seq_len, batch_stride, len(table), dim, head_dim // 2,
            PAIRS=pairs, num_warps=_num_warps(2 * pairs), **_AS_TORCH,
        )  # fmt: skip
    return y


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x``, ``[B, heads, T, H]``; ``cos``, ``sin`` are ``[B or 1, T, H]`` of its dtype."""
    cos, sin = cos.contiguous(), sin.contiguous()
    x = x.transpose(1, 2).contiguous()  # which it is, as a model's linears give it
    y = torch.empty_like(x)
    batch_size, seq_len, num_heads, head_dim = x.shape
    heads, half = triton.next_power_of_2(num_heads), triton.next_power_of_2(head_dim // 2)
    with torch.cuda.device_of(x):
        _rotate_halves[(batch_size * seq_len,)](
            x, cos, sin, y, seq_len, num_heads, head_dim // 2,
            cos.stride(0) if len(cos) > 1 else 0, HEADS=heads, HALF=half,
            num_warps=_num_warps(heads * half), **_AS_TORCH,
        )  # fmt: skip
    return y.transpose(1, 2)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """Compute act(gate) * up of one shape and dtype, in the place of a contiguous ``gate``.

    Else both are the same columns of longer rows, and the result is a new tensor.
    """
    assert gate.stride() == up.stride()
    y = gate if gate.is_contiguous() else gate.new_empty(gate.shape)
    num_values, width = gate.numel(), gate.shape[-1]
    gap = 0 if y is gate else gate.stride(-2) - width
    with torch.cuda.device_of(gate):
        _gated[(triton.cdiv(num_values, _VALUES_AT_ONCE),)](
            gate, up, y, num_values, width, gap,
            HAS_GAP=gap > 0, GELU=activation == "gelu_tanh", VALUES=_VALUES_AT_ONCE, **_AS_TORCH,
        )  # fmt: skip
    return y


def cross_entropy_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: float = 1.0,
    cap: float | None = None,
    needs_grad: bool = True,
) -> torch.Tensor:
    """Compute losses, fp32 ``[n]``; with ``needs_grad`` put their gradient in the logits' place.

    ``logits`` is contiguous ``[n, V]``; ``labels`` are int64 ``[n]``, each below V.
    """
    assert logits.is_contiguous()
    losses = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _cross_entropy[(len(labels),)](
            logits, labels, losses, logits.shape[1], scale, 0.0 if cap is None else cap,
            HAS_CAP=cap is not None, HAS_GRADIENT=needs_grad, WORDS=_WORDS_AT_ONCE, num_warps=8,
            **_AS_TORCH,
        )  # fmt: skip
    return losses


def _num_warps(num_values: int) -> int:
    """Enough for some 16 values a thread."""
    power = round(math.log2(max(1, num_values / 512)))
    return min(16, 1 << power)
