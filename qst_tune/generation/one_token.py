"""What modules compute for one token a row, with fewer operations than for many.

One token of a small model on a CPU is mostly the start of operations. Here are the same results by
fewer of them: heads that share keys read them without copies; projections of one input are one
product; a position is looked up once for all layers; weights are cast, looked up or put beside each
other once for a text. A module whose type is not known here computes what it always does.

SmolLM2-135M with a side network, ms of one core a token: int8 37.0 -> 23.1, NF4 43.1 -> 30.6;
transformers' own model in bf16 takes 31.7.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import FeedForward, MultiHeadAttention, RMSNorm, RotaryPositionalEmbeddings

from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.quantization.decoded_once import Decoded
from qst_tune.quantization.few_tokens import nf4_product
from qst_tune.quantization.kernels import has_int8_kernel

Forward: TypeAlias = Callable[..., torch.Tensor]
_ROTARY = (RotaryPositionalEmbeddings, Llama3ScaledRoPE)


class Substitute(NamedTuple):
    """What a module computes instead: its ``forward`` for one token."""

    module: nn.Module
    forward: Forward


class _Model(NamedTuple):
    """What a substitute may depend on."""

    dtype: torch.dtype
    is_cpu: bool
    decoded: Decoded  # the weights that are kept
    in_side: frozenset[nn.Module]  # whose linears autocast computes in ``dtype``
    has_hooks: bool  # linears are called one by one, for LoRA's


def substitutes(model: Any, decoded: Decoded | None) -> list[Substitute]:
    """Find what can be replaced in a model that has run once; ``decoded`` are its kept weights."""
    weight = model.tok_embeddings.weight
    side = getattr(model, "side", None)
    about = _Model(
        weight.dtype,
        weight.device.type == "cpu",
        {} if decoded is None else decoded,
        frozenset() if side is None else frozenset(side.modules()),
        getattr(side, "lora", None) is not None,
    )
    # Layers before linears, whose kept weights then are parts of those of the layer.
    found = [(m, of_kind(m, about)) for of_kind in (_of_layer, _of_part) for m in model.modules()]
    return [Substitute(module, forward) for module, forward in found if forward is not None]


@contextmanager
def substituted(chosen: Sequence[Substitute]) -> Iterator[None]:
    """Let the modules compute their substitutes here."""
    # Instances' own attributes: torch's setattr takes 2 us for each of some hundred.
    before = [module.__dict__.get("forward") for module, _ in chosen]
    for module, forward in chosen:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for (module, _), own in zip(chosen, before, strict=True):
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


@dataclass(frozen=True)
class _Linear:
    """A dense linear layer in the model's dtype."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., I]`` to ``[..., O]``."""
        return F.linear(x, self.weight, self.bias)


def _of_layer(module: nn.Module, about: _Model) -> Forward | None:
    if type(module) is MultiHeadAttention and module.q_norm is None and module.k_norm is None:
        projections: list[nn.Module] = [module.q_proj, module.k_proj, module.v_proj]
        return partial(_attention, module, _together(projections, about))
    if type(module) is FeedForward and module.w3 is not None:
        inner = [module.get_submodule(name) for name in ("w1", "w3")]
        together = _together(inner, about)
        return None if together is None else partial(_feed_forward, module, together)
    return None


def _of_part(module: nn.Module, about: _Model) -> Forward | None:
    if type(module) is NF4Linear and not about.is_cpu:
        return partial(_few_tokens, module)
    if isinstance(module, nn.Linear):
        return _dense(module, about)
    if not about.is_cpu:  # a GPU has kernels for these
        return None
    if type(module) is PEQALinear:
        return Int8Product(module) if _multiplies_int8(module, about.dtype) else None
    if type(module) is RMSNorm:
        return _norm(module, about.dtype)
    return _rotary(module) if type(module) in _ROTARY else None


def _norm(module: RMSNorm, dtype: torch.dtype) -> Forward | None:
    scale = module.scale.detach().to(dtype)
    # torch computes both alike if this cast loses nothing, as of weights that were in bf16.
    is_same = torch.equal(scale.to(module.scale.dtype), module.scale)
    return partial(_rms_norm, scale, module.eps) if is_same else None


def _rotary(module: RotaryPositionalEmbeddings) -> Forward | None:
    return _Rotary(module.cache) if module.cache.dtype == torch.float32 else None


def _multiplies_int8(module: PEQALinear, dtype: torch.dtype) -> bool:
    """Whether the layer is torch's CPU kernel for 8 bits, and nothing else."""
    added = module.repair, module.bias, module.input_order
    types = dtype, module.zero_point.dtype
    is_plain = not any(part is not None for part in added)
    return is_plain and types == (torch.bfloat16, torch.uint8) and has_int8_kernel(module.layout)


def _dense(module: nn.Module, about: _Model) -> _Linear | None:
    """A linear that is decoded, or that autocast would cast at each token."""
    if type(module) is NF4Linear:
        kept = about.decoded.get((id(module.weight), about.dtype))
        is_plain = module.repair is None and module.bias is None
        return _Linear(kept[1], None) if kept is not None and is_plain else None
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return None
    is_narrow = about.dtype != torch.float32 and module.weight.dtype != about.dtype
    if not (is_narrow and module in about.in_side):
        return None
    bias = None if module.bias is None else module.bias.detach().to(about.dtype)
    return _Linear(module.weight.detach().to(about.dtype), bias)


def _together(modules: Sequence[nn.Module], about: _Model) -> _Linear | None:
    """Put linears of one input below each other; kept weights become parts of the result."""
    linears = [_dense(module, about) for module in modules]
    if about.has_hooks or any(linear is None for linear in linears):
        return None
    known = [linear for linear in linears if linear is not None]
    weight = torch.cat([linear.weight for linear in known])
    parts = weight.split([len(linear.weight) for linear in known])
    for module, part in zip(modules, parts, strict=True):
        key = id(module.weight), about.dtype
        if key in about.decoded:
            about.decoded[key] = about.decoded[key][0], part
    biases = [linear.bias for linear in known if linear.bias is not None]
    if biases and len(biases) < len(known):
        return None
    return _Linear(weight, torch.cat(biases) if biases else None)


def _attention(
    module: MultiHeadAttention,
    together: _Linear | None,
    x: torch.Tensor,
    _: torch.Tensor,
    *,
    mask: torch.Tensor,
    input_pos: torch.Tensor,
) -> torch.Tensor:
    """Attention of ``x``, ``[B, 1, D]``, to what is cached and itself; ``mask`` ``[B, 1, L]``."""
    heads, kv_heads, width = module.num_heads, module.num_kv_heads, module.head_dim
    of_heads = x.shape[0], 1, -1, width
    if together is None:
        states = module.q_proj(x), module.k_proj(x), module.v_proj(x)
        q, k, v = (state.view(of_heads) for state in states)
        q, k = (_turned(module, state, input_pos) for state in (q, k))
    else:
        qk, v = together(x).view(of_heads).split([heads + kv_heads, kv_heads], dim=2)
        q, k = _turned(module, qk, input_pos).split([heads, kv_heads], dim=2)
    k, v = module.kv_cache.update(k.transpose(1, 2), v.transpose(1, 2))
    # Heads that share keys are like so many tokens: torchtune copies keys and values for each.
    q = q.reshape(x.shape[0], kv_heads, -1, width)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    output: torch.Tensor = module.output_proj(y.reshape(x.shape[0], 1, -1))
    return output


def _turned(
    module: MultiHeadAttention, state: torch.Tensor, input_pos: torch.Tensor
) -> torch.Tensor:
    turn = module.pos_embeddings
    return state if turn is None else turn(state, input_pos=input_pos)


def _few_tokens(module: NF4Linear, x: torch.Tensor) -> torch.Tensor:
    y = nf4_product(x, module.weight)
    if y is None:
        return NF4Linear.forward(module, x)
    if module.repair is not None:
        y = module.repair(x, y)
    return y if module.bias is None else y + module.bias


def _feed_forward(module: FeedForward, together: _Linear, x: torch.Tensor) -> torch.Tensor:
    gate, up = together(x).chunk(2, dim=-1)
    output: torch.Tensor = module.w2(module.activation(gate) * up)
    return output


def _rms_norm(scale: torch.Tensor, eps: float, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, scale.shape, scale, eps)


class _Rotary:
    """A rotary embedding of neighbouring channels, as a product of complex numbers."""

    def __init__(self, cache: torch.Tensor) -> None:
        self._turns = torch.view_as_complex(cache)  # [positions, C / 2]
        self._seen: tuple[torch.Tensor, int] | None = None
        self._turn = cache

    def __call__(self, x: torch.Tensor, *, input_pos: torch.Tensor) -> torch.Tensor:
        """Turn ``x``, ``[B, 1, H, C]``, at positions ``[B, 1]``."""
        # All layers of a pass ask for the same tensor, which may be filled anew for the next.
        if (
            self._seen is None
            or self._seen[0] is not input_pos
            or (self._seen[1] != input_pos._version)
        ):
            self._seen = input_pos, input_pos._version
            self._turn = self._turns[input_pos].unsqueeze(2)
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self._turn).flatten(3).to(x.dtype)


class Int8Product:
    """:func:`~qst_tune.quantization.kernels.int8_product` of one linear, prepared once."""

    def __init__(self, module: PEQALinear) -> None:
        self._codes = module.codes.view(torch.int8)
        self._ones = torch.ones(len(self._codes), dtype=torch.bfloat16)
        self._scale = module.weight_scale.detach().view(-1)
        self._centre = (module.zero_point.view(-1) ^ 128).view(torch.int8).float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., I]`` to ``[..., O]``."""
        x_MI = x.reshape(-1, x.shape[-1])
        y_MO = torch._weight_int8pack_mm(x_MI, self._codes, self._ones).float()
        sum_M1 = x_MI.sum(-1, keepdim=True, dtype=torch.float32)
        y_MO.addcmul_(sum_M1, self._centre, value=-1).mul_(self._scale)
        return y_MO.to(x.dtype).view(*x.shape[:-1], -1)
