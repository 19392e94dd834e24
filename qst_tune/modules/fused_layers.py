"""Frozen layers whose norms, rotary embeddings and gated MLPs run in Triton's kernels.

On a device without them, where a gradient may be wanted, or while torch compiles, a module computes
what its class does.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import (
    FeedForward,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TransformerSelfAttentionLayer,
)

from qst_tune.modules.batch_parts import where_of_rows
from qst_tune.quantization.decoded_once import decoding_once, keeps_decoded
from qst_tune.quantization.kernels import passes_trial, runs_triton
from qst_tune.torchtune_compat import Mask

# Tokens that go through a gated MLP at once: its states are several times as wide as the model. On
# an H200 a step of 16 x 2048 at 7B takes 3 % longer with 4096, whose products fill it less well.
MLP_TOKENS = 8192


@lru_cache(maxsize=32)
def _kernels_pass(device: torch.device) -> bool:
    from qst_tune.modules.fused_trial import find_fault

    return passes_trial(str(device), find_fault)


def fused_kernels() -> Any:
    """Return the module of the kernels; not every installation has Triton."""
    from qst_tune.modules import triton_kernels

    return triton_kernels


def runs_fused(x: torch.Tensor) -> bool:
    """Whether the fused kernels compute with such a tensor here."""
    return runs_triton(x, x.dtype) and _kernels_pass(x.device)


def fuse_modules(root: nn.Module, fused_of: Callable[[nn.Module], Any]) -> None:
    """Let the modules below compute ``fused_of(module)``, where it is not None, without gradients.

    It gets the module and its arguments.
    """
    modules: Any = root.modules()
    for module in modules:
        fused = fused_of(module)
        if fused is not None:
            module.forward = partial(_fused_or_plain, module, fused)


def may_fuse(x: torch.Tensor) -> bool:
    """Whether the kernels may compute with ``x`` now: they have no gradient."""
    is_plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not is_plain and runs_fused(x)


def _fused_or_plain(
    module: nn.Module, fused: Callable[..., Any], *args: Any, **kwargs: Any
) -> torch.Tensor:
    compute = fused if args and may_fuse(args[0]) else type(module).forward
    output: torch.Tensor = compute(module, *args, **kwargs)
    return output


def fuse_torchtune(root: nn.Module) -> None:
    """Fuse the modules of torchtune below."""
    fuse_modules(root, _fused_of)


def _fused_of(module: nn.Module) -> Any:
    if isinstance(module, FeedForward):
        activation = activation_name(module.activation)
        return partial(_feed_forward, activation) if activation and module.w3 else None
    kinds: dict[type, Any] = {
        RMSNorm: _rms_norm,
        GemmaRMSNorm: partial(_rms_norm, shift=1.0),
        RotaryPositionalEmbeddings: _rotary,
        Llama3ScaledRoPE: _rotary,
    }
    return kinds.get(type(module))


def activation_name(activation: Any) -> str | None:
    """Name an activation that the kernels have, or None; found out on a few numbers."""
    x = torch.linspace(-4, 4, 33, device="cpu")
    known: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": F.silu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
    }
    with torch.no_grad():
        found = activation(x)
        return next((name for name, f in known.items() if torch.equal(found, f(x))), None)


def _rms_norm(module: Any, x: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
    y: torch.Tensor = fused_kernels().rms_norm(x, module.scale, module.eps, shift=shift)
    return y


def _rotary(module: Any, x: torch.Tensor, *, input_pos: torch.Tensor | None = None) -> torch.Tensor:
    y: torch.Tensor = fused_kernels().rotate_pairs(x, module.cache, input_pos)
    return y


def _feed_forward(activation: str, module: Any, x: torch.Tensor) -> torch.Tensor:
    return gated_mlp(lambda x: (module.w1(x), module.w3(x)), module.w2, activation, x)


def gated_mlp(
    gate_and_up: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    down_proj: nn.Module,
    activation: str,
    x: torch.Tensor,
) -> torch.Tensor:
    """Compute down(act(gate(x)) * up(x)) for ``x``, ``[..., D]``, some tokens at a time."""
    gated = fused_kernels().gated

    def compute(tokens: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = down_proj(gated(*gate_and_up(tokens), activation))
        return output

    tokens = x.reshape(-1, x.shape[-1])
    if len(tokens) <= MLP_TOKENS:
        return compute(x)
    output = tokens.new_empty(tokens.shape)
    with decoding_once_for(len(tokens), MLP_TOKENS):
        for start in range(0, len(tokens), MLP_TOKENS):
            part = slice(start, start + MLP_TOKENS)
            output[part] = compute(tokens[part])
    return output.view(x.shape)


def decoding_once_for(size: int, at_once: int) -> AbstractContextManager[None]:
    """Keep decoded weights where so many rows or tokens run in more than one part."""
    return nullcontext() if size <= at_once or keeps_decoded() else decoding_once()


def has_two_halves(layer: Any, x: torch.Tensor) -> bool:
    """Whether :func:`add_attention` and :func:`add_mlp_` compute now what a call does.

    They do if no hook or other forward is on the layer.
    """
    if type(layer) is not TransformerSelfAttentionLayer or "forward" in vars(layer):
        return False
    return not has_hooks(layer) and may_fuse(x)


def has_hooks(layer: nn.Module) -> bool:
    """Whether something is to be done at a call of a layer."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def add_attention(
    layer: Any, rows_at_once: int, x: torch.Tensor, **where: Mask | None
) -> torch.Tensor:
    """Compute the first half of a torchtune layer, some rows at a time: a new tensor."""

    def attention(x: torch.Tensor, where: dict[str, Mask | None]) -> torch.Tensor:
        normed = layer.sa_norm(x)
        attended: torch.Tensor = layer.sa_scale(layer.attn(normed, normed, **where))
        return attended

    if rows_at_once >= len(x):
        return attention(x, where).add_(x)
    h = x.new_empty(x.shape)  # contiguous, whatever x is
    with decoding_once_for(len(x), rows_at_once):
        for start in range(0, len(x), rows_at_once):
            rows = slice(start, start + rows_at_once)
            torch.add(attention(x[rows], where_of_rows(where, rows, len(x))), x[rows], out=h[rows])
    return h


def add_mlp_(layer: Any, h: torch.Tensor, **_: Mask | None) -> torch.Tensor:
    """Compute the second half of a torchtune layer in place, some tokens at a time."""
    tokens = h.view(-1, h.shape[-1])
    with decoding_once_for(len(tokens), MLP_TOKENS):
        for start in range(0, len(tokens), MLP_TOKENS):
            part = tokens[start : start + MLP_TOKENS]
            part += layer.mlp_scale(layer.mlp(layer.mlp_norm(part)))
    return h
