"""Which modules of a transformers model run in Triton's kernels: those that compute what they do.

There are some two hundred types, and names say little: whether a class fits is found out by
running it on a few numbers, here on the CPU, to the bit.
"""

import inspect
from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from qst_tune.modules import fused_layers
from qst_tune.modules.fused_layers import (
    activation_name,
    fuse_modules,
    gated_mlp,
    may_fuse,
)
from qst_tune.quantization.waves import waves

_ROTARY = "apply_rotary_pos_emb"
_EPSILONS = ("variance_epsilon", "eps")


def fuse_transformers(root: nn.Module) -> None:
    """Fuse the norms, gated MLPs and rotary embeddings below that the kernels equal."""
    fuse_modules(root, _fused_of)
    modules: Any = root.modules()
    for module in modules:
        kind: Any = type(module)
        if _with_fused_rotary(kind) is not None:
            module.forward = partial(_attention, kind, module)


def _fused_of(module: Any) -> Any:
    kind: Any = type(module)
    norm = _norm_kind(kind) if _is_norm(module) else None
    if norm is not None:
        return partial(_rms_norm, *norm)
    for computes, name, fused in (
        (_is_gated, "act_fn", _gated),
        (_is_gated_jointly, "activation_fn", _gated_jointly),
    ):
        if computes(kind):
            activation = activation_name(getattr(module, name))
            return activation and partial(fused, activation)
    return None


def _is_norm(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters(recurse=False)]
    return names == ["weight"] and any(hasattr(module, name) for name in _EPSILONS)


@lru_cache(maxsize=256)
@torch.no_grad()
def _norm_kind(kind: Any) -> tuple[float, bool] | None:
    """What is added to a norm's weight, and whether it rounds before the product; None: another."""
    x, weight, eps = waves(16, 64), waves(64) + 0.5, 0.25
    try:
        with torch.device("cpu"):
            module = kind(64)
        for name in {*_EPSILONS} & {*vars(module)}:
            setattr(module, name, eps)
        module.weight = nn.Parameter(weight, requires_grad=False)
        found = kind.forward(module, x)
    except Exception:  # another signature, or other arguments
        return None
    h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    for shift in (0.0, 1.0):
        for rounds_first in (True, False):
            rounded = h.to(x.dtype).float() if rounds_first else h
            if torch.equal(found, (rounded * (weight.float() + shift)).to(x.dtype)):
                return shift, rounds_first
    return None


def _rms_norm(shift: float, rounds_first: bool, module: Any, x: torch.Tensor) -> torch.Tensor:
    if rounds_first and module.weight.dtype != x.dtype:  # torch's product has the wider dtype
        plain: torch.Tensor = type(module).forward(module, x)
        return plain
    eps = next(getattr(module, name) for name in _EPSILONS if hasattr(module, name))
    y: torch.Tensor = fused_layers.fused_kernels().rms_norm(
        x, module.weight, eps, shift=shift, rounds_first=rounds_first
    )
    return y


@lru_cache(maxsize=256)
def _is_gated(kind: Any) -> bool:
    """Whether a class computes down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
    parts = {"gate_proj": lambda h: h * 3, "up_proj": lambda h: h + 2, "act_fn": torch.sigmoid}
    return _computes_gated_mlp(kind, parts)


@lru_cache(maxsize=256)
def _is_gated_jointly(kind: Any) -> bool:
    """Whether gate and up are the halves of one product, as in Phi-3 and GLM."""
    parts = {
        "gate_up_proj": lambda h: torch.cat([h * 3, h + 2], dim=-1),
        "activation_fn": torch.sigmoid,
    }
    return _computes_gated_mlp(kind, parts)


def _computes_gated_mlp(
    kind: Any, parts: dict[str, Callable[[torch.Tensor], torch.Tensor]]
) -> bool:
    """Run a class with these parts on a few numbers."""
    x = waves(3, 8).float()
    if "forward" not in vars(kind):
        return False
    try:
        found = kind.forward(SimpleNamespace(**parts, down_proj=lambda h: h.flip(-1)), x)
    except Exception:  # it has other parts
        return False
    expected = (torch.sigmoid(x * 3) * (x + 2)).flip(-1)
    return isinstance(found, torch.Tensor) and torch.equal(found, expected)


def _gated(activation: str, module: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj, module.up_proj
    return gated_mlp(lambda x: (gate(x), up(x)), module.down_proj, activation, x)


def _gated_jointly(activation: str, module: Any, x: torch.Tensor) -> torch.Tensor:
    gate_up = module.gate_up_proj
    return gated_mlp(lambda x: gate_up(x).chunk(2, dim=-1), module.down_proj, activation, x)


def _attention(kind: Hashable, module: nn.Module, *args: object, **kwargs: object) -> object:
    # Unlike what it calls, this has a name, by which a model can be pickled.
    forward = _with_fused_rotary(kind)
    assert forward is not None
    return forward(module, *args, **kwargs)


@lru_cache(maxsize=256)
def _with_fused_rotary(kind: Hashable) -> Callable[..., Any] | None:
    """Return the forward of a class with the kernel for its rotary embedding; None: it has none.

    It is the class's own code with another function under the name of one global.
    """
    forward = vars(kind).get("forward")
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return None
    rotary = forward.__globals__.get(_ROTARY)
    if rotary is None or not _rotates_halves(rotary):
        return None
    names = {**forward.__globals__, _ROTARY: partial(_rotated, rotary)}
    rebound = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    rebound.__kwdefaults__ = forward.__kwdefaults__
    return rebound


@lru_cache(maxsize=256)
def _rotates_halves(rotary: Callable[..., Any]) -> bool:
    """Whether a function is Llama's rotary embedding of queries and keys."""
    if list(inspect.signature(rotary).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    q, k = waves(2, 4, 3, 8), waves(2, 2, 3, 8) * 0.7
    cos, sin = waves(2, 3, 8), waves(2, 3, 8) * 0.3
    try:
        found = rotary(q, k, cos, sin)
    except Exception:  # other shapes
        return False
    expected = [_plainly_rotated(x, cos[:, None], sin[:, None]) for x in (q, k)]
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def _plainly_rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _rotated(
    rotary: Callable[..., tuple[torch.Tensor, ...]],
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    **more: Any,
) -> tuple[torch.Tensor, ...]:
    """Rotate queries and keys ``[B, heads, T, H]`` in the kernel if it fits, else by ``rotary``."""
    fits = (
        not more
        and q.ndim == 4
        and cos.ndim == 3
        and cos.dtype == sin.dtype == q.dtype == k.dtype
        and cos.shape[1:] == (q.shape[2], q.shape[3]) == (k.shape[2], k.shape[3])
        and len(cos) in (1, len(q))
    )
    if not (fits and may_fuse(q)):
        return rotary(q, k, cos, sin, **more)
    rotate_halves = fused_layers.fused_kernels().rotate_halves
    return rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)
