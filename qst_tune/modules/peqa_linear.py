"""A linear layer with frozen integer codes and trained scales."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qst_tune.modules.repair import Repair
from qst_tune.quantization.affine import (
    AffineInit,
    AffineLayout,
    AffineWeight,
    centred_groups,
    centred_rows,
    check_affine,
    dequantize_affine,
    quantize_affine,
    row_parts,
    to_groups,
)
from qst_tune.quantization.decoded_once import decoded
from qst_tune.quantization.kernels import affine_product
from qst_tune.quantization.packing import pack, unpack
from qst_tune.quantization.stored import StoredAffine, in_own_order

# Outputs scaled at once on a CPU: 1 MiB in fp32, which stays in the cache.
_VALUES_AT_ONCE = 2**18


class PEQALinear(nn.Module):
    r"""Linear layer of PEQA: integer codes are frozen, their scales train.

    .. math:: y = x\,\hat W^\top + b, \qquad \hat W_{oi} = s_{o,g(i)}\,(q_{oi} - z_{o,g(i)})

    where :math:`q \in \{0,\dots,2^b-1\}` are the codes (frozen, packed), :math:`s` the scales
    (trained, fp32), :math:`z` the zero points (frozen) and :math:`g(i) = \lfloor i / g \rfloor` the
    group of input channel i. The weight is decoded at each call, and codes are never rounded again.

    With one scale a channel it is applied behind the product, so that its gradient needs neither
    the input nor a gradient of the weight; in groups the weight's gradient is made and summed a few
    rows at a time. Saved for backward: the output per channel; the input in groups and where
    the model overwrites outputs.

    Source: PEQA (https://arxiv.org/abs/2305.14152), equation 2, with ``weight_scale`` for its
    :math:`s_0 + \Delta s`.

    Shapes (O out, I in, G groups a row): weight ``[O, I]``, quantised here, may be meta; bias
    ``[O]``, frozen; codes ``[O, packed_dim(G g, bits)]`` uint8; weight_scale ``[O, G]`` fp32;
    zero_point ``[O, G]`` uint8, or fp32 with ``train_zero_points``, the paper's ablation.
    input_order: None, or ``[I]`` int64, the input channel of each column of the codes, where a
    GPTQ directory groups them so (act-order).
    """

    output_is_overwritten = False
    codes: torch.Tensor
    zero_point: torch.Tensor
    input_order: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        bits: int = 4,
        group_size: int | None = None,
        init: AffineInit = "rtn",
        train_zero_points: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        check_affine(bits, group_size, init)
        # A group wider than the row is the row.
        width = min(group_size or self.in_features, self.in_features)
        self.layout = AffineLayout(bits, width, self.in_features)
        self.init = init
        groups = "per channel" if group_size is None else f"groups of {group_size}"
        self.quantization = f"int{bits}, {groups}, {init}"
        self.train_zero_points = train_zero_points
        self.repair: Repair | None = None
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.quantize_(weight)

    def quantize_(self, weight: torch.Tensor) -> None:
        """Quantise a dense weight ``[O, I]``, on its device; scales start anew."""
        if weight.is_meta:  # shapes alone: quantising on meta takes 10 s for the layers of a 70B
            codes = weight.new_empty(self.out_features, self.layout.num_bytes, dtype=torch.uint8)
            scale = weight.new_empty(self.out_features, self.layout.num_groups, dtype=torch.float32)
            zero_point = torch.empty_like(scale, dtype=torch.uint8)
        else:
            unpacked, scale, zero_point = quantize_affine(
                weight, bits=self.layout.bits, group_size=self.layout.group_size, init=self.init
            )
            codes = pack(unpacked, self.layout.bits)
        self._set(codes, scale, zero_point)

    def take_(self, stored: StoredAffine) -> None:
        """Replace the weight by one that a directory stores, with its codes, scales and layout."""
        self.layout = stored.layout
        _, scale, zero_point = stored.weight
        self._set(stored.packed(), scale, zero_point, stored.order)

    def _set(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        order: torch.Tensor | None = None,
    ) -> None:
        self.register_buffer("codes", codes)
        self.register_buffer("input_order", order)
        before = self._parameters.get("weight_scale")
        trains = before is None or before.requires_grad
        self.weight_scale = nn.Parameter(scale, requires_grad=trains)
        if self.train_zero_points:
            self.zero_point = nn.Parameter(zero_point.float(), requires_grad=trains)
        else:
            self.register_buffer("zero_point", zero_point)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Quantise a dense weight here: torchtune's own recipes load a whole model at once."""
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, torch.Tensor):
            device = weight.device if self.codes.is_meta else self.codes.device
            self.quantize_(weight.to(device=device, dtype=torch.float32))
            rest = {name: value for name, value in state_dict.items() if name != f"{prefix}weight"}
            own = {f"{prefix}{name}": value for name, value in self.state_dict().items()}
            state_dict = {**own, **rest}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def adapter_params(self) -> list[str]:
        """Names of the trainable parameters, as torchtune's adapter protocol asks."""
        return ["weight_scale", "zero_point"] if self.train_zero_points else ["weight_scale"]

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Decode the weight, repaired if it is, without gradient."""
        scale, zero_point = self.weight_scale.detach(), self.zero_point.detach()
        weight = dequantize_affine(self.codes, scale, zero_point, self.layout, dtype)
        if self.input_order is not None:
            weight = in_own_order(weight, self.input_order)
        return weight if self.repair is None else self.repair.added_to(weight)

    def affine_weight(self) -> AffineWeight:
        """Unpack codes ``[O, I]``, columns in ``input_order``; scales and zero points."""
        codes = unpack(self.codes, self.layout.bits, self.in_features)
        return AffineWeight(codes, self.weight_scale.detach(), self.zero_point.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., I]`` to ``[..., O]`` in the dtype of ``x``."""
        ordered = x if self.input_order is None else x.index_select(-1, self.input_order)
        own = (self.codes, self.weight_scale, self.zero_point, self.layout)
        y: torch.Tensor | None = affine_product(ordered, *own)
        if y is None:
            y = self._product_with_decoded(ordered)
        if self.repair is not None:
            y = self.repair(x, y)
        return y if self.bias is None else y + self.bias

    def _product_with_decoded(self, x: torch.Tensor) -> torch.Tensor:
        # A trained zero point is no whole number, so codes minus it would be rounded in bf16.
        per_channel = self.layout.num_groups == 1 and not self.train_zero_points
        # A product with codes, before its scale, can leave the range of fp16, which ends at 65504.
        per_channel = per_channel and x.dtype != torch.float16 and not self.output_is_overwritten
        function: Any = _PerChannel if per_channel else _Grouped
        y: torch.Tensor = function.apply(
            x, self.weight_scale, self.zero_point, self.codes, self.layout
        )
        return y


def scale_columns_(values: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """Multiply ``[..., O]`` in place by one number a column, in the wider dtype of the two.

    On a CPU a few rows at once: there torch copies the whole to the wider dtype, which took as long
    as the product before it (for 1024 x 1536 in bf16 25 ms, in parts 1).
    """
    if values.device.type != "cpu" or values.dtype == weight_scale.dtype:
        return values.mul_(weight_scale)
    num_columns = len(weight_scale)
    for rows in values.view(-1, num_columns).split(max(1, _VALUES_AT_ONCE // num_columns)):
        rows.copy_(rows.to(weight_scale.dtype).mul_(weight_scale))
    return values


class _PerChannel(torch.autograd.Function):
    """``y = (x (q - z)^T) s``; saves y, which the next operation often saves anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_scale: torch.Tensor,
        zero_point: torch.Tensor,
        codes: torch.Tensor,
        layout: AffineLayout,
    ) -> torch.Tensor:
        def centred(dtype: torch.dtype) -> torch.Tensor:
            return centred_rows(codes, zero_point, layout, dtype)

        whole = decoded(codes, x.dtype, lambda: centred(x.dtype))
        y = scale_columns_(F.linear(x, whole), weight_scale.squeeze(1))
        ctx.centred = centred
        ctx.save_for_backward(weight_scale, *([y] if weight_scale.requires_grad else []))
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_x, needs_scale, *_ = ctx.needs_input_grad
        weight_scale, *saved = ctx.saved_tensors  # once: recomputation forbids a second look
        scale = weight_scale.squeeze(1)
        grad_x = grad_scale = None
        if needs_scale:
            # x (q - z)^T is y / s: no second product. Where s is exactly 0, it is lost and s stays.
            over_tokens = (grad * saved[0]).flatten(0, -2).sum(0, dtype=scale.dtype)
            grad_scale = torch.where(scale == 0, 0.0, over_tokens / scale).unsqueeze(1)
        if needs_x:
            scaled = scale_columns_(grad.clone(memory_format=torch.contiguous_format), scale)
            grad_x = scaled @ ctx.centred(grad.dtype)
        return grad_x, grad_scale, None, None, None


class _Grouped(torch.autograd.Function):
    """``y = x W^T`` with the decoded weight; its gradient is summed to groups a few rows a time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_scale: torch.Tensor,
        zero_point: torch.Tensor,
        codes: torch.Tensor,
        layout: AffineLayout,
    ) -> torch.Tensor:
        ctx.codes, ctx.layout = codes, layout
        trains = weight_scale.requires_grad or zero_point.requires_grad
        ctx.save_for_backward(weight_scale, zero_point, *([x] if trains else []))
        own = (codes, weight_scale, zero_point, layout, x.dtype)
        return F.linear(x, decoded(codes, x.dtype, lambda: dequantize_affine(*own)))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_x, needs_scale, needs_zero_point, *_ = ctx.needs_input_grad
        weight_scale, zero_point, *saved = ctx.saved_tensors  # once, as above
        grad_x = grad_scale = grad_zero_point = None
        if needs_x:
            grad_x = grad @ dequantize_affine(
                ctx.codes, weight_scale, zero_point, ctx.layout, grad.dtype
            )
        if needs_scale or needs_zero_point:
            grad_scale, grad_sum = _group_sums(
                saved[0].flatten(0, -2), grad.flatten(0, -2), ctx.codes, zero_point, ctx.layout
            )
            grad_zero_point = -weight_scale * grad_sum if needs_zero_point else None
            grad_scale = grad_scale.to(weight_scale.dtype)
        return grad_x, grad_scale, grad_zero_point, None, None


def _group_sums(
    x_NI: torch.Tensor,
    grad_NO: torch.Tensor,
    codes: torch.Tensor,
    zero_point: torch.Tensor,
    layout: AffineLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over each group of the weight's gradient, times ``q - z`` and plain: both ``[O, G]``."""
    dtype = torch.promote_types(x_NI.dtype, torch.float32)
    weighted = torch.empty(zero_point.shape, dtype=dtype, device=codes.device)
    plain = torch.empty_like(weighted)
    for rows in row_parts(len(codes), layout.in_dim):
        grad_OGg = to_groups(grad_NO[:, rows].T @ x_NI, layout.group_size)
        if grad_OGg.dtype == torch.float16:  # times a code it could exceed 65504
            grad_OGg = grad_OGg.float()
        centred_OGg = centred_groups(codes[rows], zero_point[rows], layout, grad_OGg.dtype)
        weighted[rows] = (grad_OGg * centred_OGg).sum(-1, dtype=dtype)
        plain[rows] = grad_OGg.sum(-1, dtype=dtype)
    return weighted, plain
