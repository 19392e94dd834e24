"""A frozen linear layer whose weight is stored in 4 bits, as NF4 or FP4."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.modules.repair import Repair
from qst_tune.quantization.decoded_once import decoded, keeps_decoded
from qst_tune.quantization.kernels import is_few_tokens
from qst_tune.quantization.nf4 import QuantType, decoded_rows, dequantize_nf4, quantize_nf4
from qst_tune.quantization.scale_search import quantize_nf4_weighed


class _MatmulNF4(torch.autograd.Function):
    """``x W^T`` that saves only the 4-bit weight for the gradient of ``x``."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, weight: NF4Tensor
    ) -> torch.Tensor:
        ctx.weight = weight  # type: ignore[attr-defined]  # a constant, not a saved activation
        return F.linear(x, dequantize_nf4(weight).to(x.dtype))

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        weight: NF4Tensor = ctx.weight  # type: ignore[attr-defined]
        return grad @ dequantize_nf4(weight).to(grad.dtype), None


def _without_gradient(x: torch.Tensor, weight: NF4Tensor) -> torch.Tensor:
    """``x W^T`` with a weight that is decoded whole, or in parts.

    In parts a large weight is never whole in memory: one token through 8192 x 2048 takes 14 instead
    of 29 ms (one CPU core, bf16). A GPU would only wait for more and smaller kernels.
    """
    if is_few_tokens(x) and not keeps_decoded():
        return torch.cat([F.linear(x, part.to(x.dtype)) for part in decoded_rows(weight)], dim=-1)
    return F.linear(x, decoded(weight, x.dtype, lambda: dequantize_nf4(weight).to(x.dtype)))


class NF4Linear(nn.Linear):
    r"""Linear layer with a frozen NF4 or FP4 weight, decoded at each call.

    .. math:: y = x\,\mathrm{decode}(W_{\mathrm{NF4}})^\top + b

    Unlike torchtune's ``FrozenNF4Linear`` it takes any width
    (:func:`~qst_tune.quantization.nf4.nf4_block_sizes`) and decodes several times faster on a CPU.
    ``weight``, ``[out_dim, in_dim]``, is dense (quantised here; may be meta) or a torchao
    ``NF4Tensor`` of type ``quant_type``; loading a dense weight quantises. A gradient flows to
    ``x`` only.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        quant_type: QuantType = "nf4",
    ) -> None:
        out_dim, in_dim = weight.shape
        super().__init__(in_dim, out_dim, bias=bias is not None, device="meta")
        self.quant_type: QuantType = quant_type
        self.quantization: str = quant_type
        self.repair: Repair | None = None
        if isinstance(weight, NF4Tensor):
            self.weight = nn.Parameter(weight, requires_grad=False)
        else:
            self.quantize_(weight)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def quantize_(self, weight: torch.Tensor) -> None:
        """Replace the weight by a dense one, quantised; its dtype becomes that of the layer."""
        quantized = quantize_nf4(weight, self.quant_type)
        self.weight = nn.Parameter(quantized, requires_grad=False)

    def quantize_weighed_(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        """Replace the weight by a dense one, with the scales that its inputs' mean squares choose.

        Dtype and device stay; ``importance`` is fp32 ``[in_dim]``.
        """
        dense = weight.to(device=self.weight.device, dtype=self.weight.dtype)
        quantized = quantize_nf4_weighed(dense, importance.to(dense.device), self.quant_type)
        self.weight = nn.Parameter(quantized, requires_grad=False)

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Decode the weight, repaired if it is."""
        weight = dequantize_nf4(self.weight).to(dtype)
        return weight if self.repair is None else self.repair.added_to(weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in_dim]`` to ``[..., out_dim]`` in the dtype of ``input``."""
        weight: NF4Tensor = self.weight
        if torch.is_grad_enabled():
            y: torch.Tensor = _MatmulNF4.apply(input, weight)  # type: ignore[no-untyped-call]
        else:
            y = _without_gradient(input, weight)
        if self.repair is not None:
            y = self.repair(input, y)
        return y if self.bias is None else y + self.bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Quantise a dense weight here: left to torchao, every one would become NF4."""
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, torch.Tensor) and not isinstance(weight, NF4Tensor):
            device = weight.device if self.weight.is_meta else self.weight.device
            dense = weight.to(device=device, dtype=self.weight.dtype)
            quantized = quantize_nf4(dense, self.quant_type)
            state_dict = {**state_dict, f"{prefix}weight": quantized}
        super()._load_from_state_dict(state_dict, prefix, *args)
