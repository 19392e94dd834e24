"""Fake tensors that behave as on a device which need not exist.

All fake tensors claim to be on the CPU, since a torch without CUDA cannot run backward through fake
tensors elsewhere. Where CUDA allocates something else than the CPU, :func:`device_kernels` and
:func:`workspace_of` put that in its place.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, TypeAlias, get_args
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.backbone.transformers import CHUNK_TOKENS
from qst_tune.modules import batch_parts, fused_layers, lora, loss, peqa_linear
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.side import compute
from qst_tune.quantization import nf4
from qst_tune.quantization.nf4 import QuantType
from qst_tune.quantization.table import WEIGHTS_AT_ONCE
from qst_tune.training import task

DeviceType = Literal["cpu", "cuda"]
Attention = Literal["fused", "plain"]
# Loops over the rows or tokens of a batch.
BATCH_LOOPS = (loss, batch_parts, fused_layers)
Workspace: TypeAlias = dict[Any, Callable[..., int]]

_aten = torch.ops.aten
_rms_norm, _layer_norm = F.rms_norm, F.layer_norm
# What Triton's kernels return: new tensors, but the gated MLP's first argument if it can be.
_KERNELS = SimpleNamespace(
    rms_norm=lambda x, *_, **__: torch.empty_like(x),
    rotate_pairs=lambda x, *_: torch.empty_like(x),
    rotate_halves=lambda x, *_: torch.empty_like(x),
    gated=lambda gate, *_: gate if gate.is_contiguous() else gate.new_empty(gate.shape),
    cross_entropy_=lambda logits, *_, **__: torch.empty(len(logits), dtype=torch.float32),
)


@contextmanager
def fake_tensors(dtype: torch.dtype) -> Iterator[None]:
    """Make every tensor that is created in the block a fake one: shapes, but no memory.

    ``dtype`` is that of the backbone.
    """
    # Tables that are made once and kept, such as the decoder's, must not be made of fake tensors.
    for quant_type in get_args(QuantType):
        NF4Linear(torch.zeros(64, 64, dtype=dtype), quant_type=quant_type)
    with _QuickFakeTensorMode(allow_non_fake_inputs=True):
        yield


class _QuickFakeTensorMode(FakeTensorMode):
    """A FakeTensorMode without torch's detours for two operations that a step has thousands of."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is _aten.index_select.out:
            return kwargs["out"]  # nothing to compute: 5 and not 440 us
        if func is _aten._unsafe_view.default:  # one that torch caches: 100 and not 250 us
            func = _aten.view.default
        return super().__torch_dispatch__(func, types, args, kwargs)


def allocate_fake(module: nn.Module, device: DeviceType) -> None:
    """Replace, in place, the meta tensors of a module by fake ones; inside :func:`fake_tensors`.

    NF4 weights claim to be on ``device``, so that the code that decodes them chooses accordingly.
    """
    # By identity, so that a tied weight stays one; with the tensor, so that no id is used again.
    fakes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in fakes:
            fakes[id(tensor)] = (tensor, _fake(tensor, device))
        return fakes[id(tensor)][1]

    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            setattr(child, name, fake(parameter))
        for name, buffer in child.named_buffers(recurse=False):
            setattr(child, name, fake(buffer))


def _fake(tensor: torch.Tensor, device: DeviceType) -> torch.Tensor:
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        if isinstance(tensor, NF4Tensor):
            layout = dataclasses.replace(context["tensor_meta"], device=torch.device(device))
            context = {**context, "tensor_meta": layout}
        parts = {name: _fake(getattr(tensor, name), device) for name in names}
        weight = tensor.__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
        return nn.Parameter(weight, requires_grad=False)
    fake = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


@contextmanager
def device_kernels(
    device: DeviceType,
    attention: Attention = "fused",
    repeat: Callable[[int], None] = lambda times: None,
) -> Iterator[None]:
    """Run what a device would run in place of a few functions of torch, for the block.

    The functions are replaced and not caught by a TorchFunctionMode, since that is off while
    autograd runs, and so for everything that is recomputed in backward. Attention is "fused", as
    torch chooses a kernel that never holds the ``[B, heads, T, T]`` scores, or "plain": softmax(q k
    / sqrt(d) + mask) v one operation after the other, which saves the softmax in the dtype of q.
    ``repeat`` gets how many experts of a mixture the next one represents.
    """
    instead: dict[str, Callable[..., torch.Tensor]] = {}
    if device == "cuda":
        instead["rms_norm"] = _cuda_rms_norm
        instead["layer_norm"] = _cuda_layer_norm
        instead["scaled_dot_product_attention"] = _cuda_attention
    if attention == "plain":
        instead["scaled_dot_product_attention"] = _plain_attention
    with ExitStack() as stack:
        if device == "cuda":  # one kernel for two dtypes
            stack.enter_context(patch.object(peqa_linear, "scale_columns_", torch.Tensor.mul_))
            stack.enter_context(patch.object(fused_layers, "runs_fused", lambda x: True))
            stack.enter_context(patch.object(fused_layers, "fused_kernels", lambda: _KERNELS))
        for name, function in instead.items():
            stack.enter_context(patch.object(F, name, function))
        stack.enter_context(patch.dict(WEIGHTS_AT_ONCE, cpu=WEIGHTS_AT_ONCE[device]))
        stack.enter_context(patch.dict(CHUNK_TOKENS, cpu=CHUNK_TOKENS[device]))
        # Lookups, which count as no operation, and rows that run forward and backward in turn.
        stack.enter_context(first_and_last_parts(nf4, task))
        stack.enter_context(patch.object(loss, "rows_with_label", lambda kept, num_kept: None))
        for module in (lora, compute):
            checkpoint = partial(module.checkpoint, context_fn=recomputation)
            stack.enter_context(patch.object(module, "checkpoint", checkpoint))
        if masks := sys.modules.get("transformers.masking_utils"):
            # It makes masks for fake tensors that it does without for real ones.
            stack.enter_context(patch.object(masks, "is_tracing", lambda *_: False, create=True))
        stack.enter_context(UnknownValues(repeat))
        yield


@contextmanager
def first_and_last_parts(*modules: ModuleType) -> Iterator[None]:
    """Run of each loop over parts in these modules only the first two parts and the last one.

    Such a loop is over ``range(start, stop, step)``. The parts between have the size of the second,
    and what they allocate they release: they take time and change no peak, but what they compute is
    missing in the number of operations.
    """
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "range", _first_and_last, create=True))
        yield


def _first_and_last(*bounds: int) -> Sequence[int]:
    """As ``range``; fewer numbers where it has a step, which loops over parts have."""
    numbers = range(*bounds)
    is_long = len(bounds) == 3 and len(numbers) > 3  # start, stop and step
    return [*numbers[:2], numbers[-1]] if is_long else numbers


class UnknownValues(TorchFunctionMode):
    """Decide what depends on the values of tensors, which fake ones do not have.

    Boolean indexing keeps everything, a tensor is true, and a number read from one is 1. In a
    mixture of experts as transformers writes it, every expert is hit, and all by as many tokens: so
    without gradient the loop over them runs for the first two and the last, and ``repeat`` gets how
    many experts the next one represents.
    """

    def __init__(self, repeat: Callable[[int], None]) -> None:
        super().__init__()
        self._repeat = repeat
        self._num_experts = 1

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.__bool__:
            return True
        if func is torch.Tensor.item:
            return 1
        if func is torch.Tensor.__getitem__:
            return _select_all(*args)
        if func is torch.Tensor.nonzero:
            return self._nonzero(*args)
        if func is torch.where and len(args) == 1:  # of an expert's tokens, [k, T]
            count = max(1, args[0].numel() // self._num_experts)
            return tuple(torch.zeros(count, dtype=torch.int64) for _ in args[0].shape)
        return func(*args, **(kwargs or {}))

    def _nonzero(self, tensor: torch.Tensor) -> Any:
        """Indices; of one dimension, the numbers of the experts that are hit, not tensors."""
        if tensor.ndim != 1:
            return torch.zeros(tensor.numel(), tensor.ndim, dtype=torch.int64)
        self._num_experts = len(tensor)
        return self._experts(len(tensor))

    def _experts(self, count: int) -> Iterator[list[int]]:
        few = range(count) if torch.is_grad_enabled() else _first_and_last(0, count, 1)
        for index in few:
            self._repeat(1 + count - len(few) if index == 1 else 1)
            yield [index]
        self._repeat(1)


def recomputation() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For ``torch.utils.checkpoint``: in backward torch takes the modes of the caller away."""
    return nullcontext(), UnknownValues(lambda times: None)


def workspace_of(device: DeviceType) -> Workspace:
    """Bytes that kernels take and return within one operation, by the function of its arguments."""
    if device == "cpu":
        return {_aten.bmm: _cpu_bmm_workspace}
    return {_aten._scaled_dot_product_flash_attention_backward: _flash_backward_workspace}


def _cpu_bmm_workspace(_: torch.Tensor, weight: torch.Tensor) -> int:
    """A matrix that is shared by the batch, as of a linear layer, is copied for each row in bf16.

    torch multiplies so, instead of folding the batch into one product, where the input is a slice
    along its tokens: the chunks of torchtune's CEWithChunkedOutputLoss.
    """
    is_shared = weight.stride(0) < weight.shape[1] * weight.shape[2]
    is_copied = is_shared and weight.dtype == torch.bfloat16
    return weight.numel() * weight.itemsize if is_copied else 0


def _flash_backward_workspace(_: torch.Tensor, query: torch.Tensor, *__: object) -> int:
    """FlashAttention-2 adds up the gradient of q in fp32, in tiles of 128 tokens x 32 channels."""
    batch, heads, tokens, head_dim = query.shape
    tokens, head_dim = _round_up(tokens, 128), _round_up(head_dim, 32)
    return batch * heads * tokens * (head_dim + 1) * 4


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _select_all(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
        # Integers allocate the same: an index of 8 bytes an element, and zeros in backward.
        tensor, index = tensor.flatten(0, index.ndim - 1), torch.arange(index.numel())
    return tensor[index]


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    **_: object,
) -> torch.Tensor:
    tokens = query.shape[2]
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    mask = attn_mask if attn_mask is not None else scores.new_empty(tokens, tokens)
    scores = scores + mask.to(scores.dtype)
    return F.softmax(scores, dim=-1) @ value


def _cuda_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.dtype == torch.float32 or attn_mask is not None:
        output: torch.Tensor = _aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale
        )[0]
        return output
    head_dim = query.shape[-1]
    if head_dim % 8:  # torch pads for the kernel
        padding = (0, -head_dim % 8)
        query, key, value = F.pad(query, padding), F.pad(key, padding), F.pad(value, padding)
    output = _aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, scale=scale
    )[0]
    return output[..., :head_dim]


def _cuda_layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Under autocast CUDA computes it, and returns it, in fp32; the CPU does not."""
    if torch.is_autocast_enabled("cpu"):
        input = input.float()
    return _layer_norm(input, normalized_shape, weight, bias, eps)


def _cuda_rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """One kernel, or for a weight of another dtype a sequence of operations as on a CPU."""
    if weight is not None and weight.dtype != input.dtype:
        return _rms_norm(input, normalized_shape, weight, eps)
    output: torch.Tensor = _FusedRMSNorm.apply(input, weight)  # type: ignore[no-untyped-call]
    return output


class _FusedRMSNorm(torch.autograd.Function):
    """What ``aten._fused_rms_norm`` allocates on CUDA: its result and one number a token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        return torch.empty_like(x), torch.empty_like(weight) if needs_weight else None
