"""What modules compute for one token a row, with fewer operations than for many.

One token of a small model on a CPU is mostly the start of operations. Here are the same results by
fewer of them: heads that share keys read them without copies; projections of one input are one
product; a position is looked up once for all layers; weights are cast, looked up or put beside each
other once for a text. A module whose type is not known here computes what it always does. What it
gives: docs/using.md.
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
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TransformerSelfAttentionLayer,
)

from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.quantization.decoded_once import Decoded
from qst_tune.quantization.few_tokens import integer_product, nf4_product
from qst_tune.quantization.kernels import has_int8_kernel, int8_product, int8_weight

Forward: TypeAlias = Callable[..., torch.Tensor]
Called: TypeAlias = Callable[[nn.Module], Forward]
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
    modules: list[nn.Module] = list(model.modules())
    # First, so that the kept weights of linears are parts of those.
    together = {module: _inputs_together(module, about) for module in modules}
    found = {m: forward for m in modules if (forward := _of_part(m, about)) is not None}

    def called(module: nn.Module) -> Forward:
        return module if about.has_hooks else found.get(module, module)

    for module in modules:
        if type(module) is MultiHeadAttention and module.q_norm is None and module.k_norm is None:
            found[module] = _Attention(module, together[module], called)
        elif (weight := together[module]) is not None:
            found[module] = _GatedMLP(module, weight, called)
    # Their parts are called without being modules, which takes 2 us each.
    layers = [m for m in modules if about.is_cpu and not about.has_hooks and _is_plain_layer(m)]
    inside = {part for layer in layers for part in layer.modules()}
    outside = [Substitute(*pair) for pair in found.items() if pair[0] not in inside]
    return [*outside, *(Substitute(layer, _Layer(layer, called)) for layer in layers)]


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


def _inputs_together(module: nn.Module, about: _Model) -> _Linear | None:
    """Put the projections that read an attention's or a gated MLP's input below each other."""
    names = {MultiHeadAttention: ("q_proj", "k_proj", "v_proj"), FeedForward: ("w1", "w3")}
    parts = [getattr(module, name) for name in names.get(type(module), ())]
    return _together(parts, about) if parts and parts[-1] is not None else None


def _is_plain_layer(module: nn.Module) -> bool:
    if type(module) is not TransformerSelfAttentionLayer:
        return False
    scales = module.sa_scale, module.mlp_scale
    hooks = [part._forward_hooks or part._forward_pre_hooks for part in module.modules()]
    return all(type(scale) is nn.Identity for scale in scales) and not any(hooks)


def _of_part(module: nn.Module, about: _Model) -> Forward | None:
    if type(module) is NF4Linear and not about.is_cpu:
        return partial(_times_levels, module)
    if isinstance(module, nn.Linear):
        return _dense(module, about)
    if type(module) is PEQALinear:
        if not about.is_cpu:
            return partial(_times_integers, module)
        return _times_bytes(module) if _multiplies_int8(module, about.dtype) else None
    if not about.is_cpu:  # a GPU has kernels for these
        return None
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


class _Layer:
    """A layer whose parts are called directly."""

    def __init__(self, layer: TransformerSelfAttentionLayer, called: Called) -> None:
        self._norms = called(layer.sa_norm), called(layer.mlp_norm)
        self._attn, self._mlp = called(layer.attn), called(layer.mlp)

    def __call__(
        self, x: torch.Tensor, *, mask: torch.Tensor, input_pos: torch.Tensor, **_: None
    ) -> torch.Tensor:
        """Map ``[B, 1, D]`` to ``[B, 1, D]``; torchtune gives what it has of an encoder too."""
        normed = self._norms[0](x)
        h = self._attn(normed, normed, mask=mask, input_pos=input_pos) + x
        return h + self._mlp(self._norms[1](h))


class _Attention:
    """Attention of one token to what is cached and itself."""

    def __init__(
        self, module: MultiHeadAttention, together: _Linear | None, called: Called
    ) -> None:
        self._module, self._together = module, together
        self._heads = module.num_heads, module.num_kv_heads
        self._inputs = [called(m) for m in (module.q_proj, module.k_proj, module.v_proj)]
        self._output = called(module.output_proj)
        rotary = module.pos_embeddings
        self._turn = (lambda x, input_pos: x) if rotary is None else called(rotary)

    def __call__(
        self, x: torch.Tensor, _: torch.Tensor, *, mask: torch.Tensor, input_pos: torch.Tensor
    ) -> torch.Tensor:
        """Map ``[B, 1, D]`` to ``[B, 1, D]``; ``mask`` is ``[B, 1, L]``."""
        q, k, v = self._projected(x, input_pos)
        k, v = self._module.kv_cache.update(k.transpose(1, 2), v.transpose(1, 2))
        # Heads that share keys are like so many tokens: torchtune copies keys and values for each.
        q = q.reshape(x.shape[0], self._heads[1], -1, q.shape[-1])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        return self._output(y.reshape(x.shape[0], 1, -1))

    def _projected(self, x: torch.Tensor, input_pos: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return q, k and v, each ``[B, 1, heads, C]``."""
        heads, kv_heads = self._heads
        of_heads = x.shape[0], 1, -1, self._module.head_dim
        if self._together is not None:
            states = self._together(x).view(of_heads)
            qk, v = states.split_with_sizes([heads + kv_heads, kv_heads], dim=2)
            q, k = self._turn(qk, input_pos=input_pos).split_with_sizes(self._heads, dim=2)
            return q, k, v
        q, k, v = (linear(x).view(of_heads) for linear in self._inputs)
        return self._turn(q, input_pos=input_pos), self._turn(k, input_pos=input_pos), v


class _GatedMLP:
    """An MLP whose first two products are one."""

    def __init__(self, module: FeedForward, together: _Linear, called: Called) -> None:
        self._together, self._activation = together, module.activation
        self._down = called(module.w2)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., D]`` to ``[..., D]``."""
        gate, up = self._together(x).chunk(2, dim=-1)
        return self._down(self._activation(gate) * up)


def _times_levels(module: NF4Linear, x: torch.Tensor) -> torch.Tensor:
    y = nf4_product(x, module.weight)
    return NF4Linear.forward(module, x) if y is None else _finished(module, x, y)


def _times_integers(module: PEQALinear, x: torch.Tensor) -> torch.Tensor:
    stored = module.codes, module.weight_scale, module.zero_point, module.layout
    y = integer_product(x, *stored) if module.input_order is None else None
    return PEQALinear.forward(module, x) if y is None else _finished(module, x, y)


def _times_bytes(module: PEQALinear) -> Forward:
    stored = module.codes, module.weight_scale.detach(), module.zero_point
    return partial(int8_product, int8_weight(*stored))


def _finished(module: NF4Linear | PEQALinear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Add to a product what the layer adds."""
    if module.repair is not None:
        y = module.repair(x, y)
    return y if module.bias is None else y + module.bias


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
