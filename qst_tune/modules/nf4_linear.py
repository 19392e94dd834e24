"""A frozen linear layer whose weight is stored in NF4."""

import torch
import torch.nn.functional as F
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.quantization.nf4 import dequantize_nf4, quantize_nf4


class _MatmulNF4(torch.autograd.Function):
    """``x W^T`` that keeps only the 4-bit weight for the gradient of ``x``."""

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


class NF4Linear(nn.Linear):
    r"""Linear layer with a frozen NF4 weight, decoded at each call.

    .. math:: y = x\,\mathrm{decode}(W_{\mathrm{NF4}})^\top + b

    Unlike torchtune's ``FrozenNF4Linear`` it takes any width
    (:func:`~qst_tune.quantization.nf4.nf4_block_sizes`) and decodes several times faster on a CPU.
    ``weight`` is a torchao ``NF4Tensor`` ``[out_dim, in_dim]``; loading a dense weight into it
    quantises, and a gradient flows to ``x`` only.

    Args:
        weight (torch.Tensor): ``[out_dim, in_dim]``; dense (quantised here) or NF4, may be meta.
        bias (torch.Tensor | None): ``[out_dim]``, kept in its dtype, frozen. Default: None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        out_dim, in_dim = weight.shape
        super().__init__(in_dim, out_dim, bias=bias is not None, device="meta")
        quantized = weight if isinstance(weight, NF4Tensor) else quantize_nf4(weight)
        self.weight = nn.Parameter(quantized, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Args:
            input (torch.Tensor): ``[..., in_dim]``.

        Returns:
            torch.Tensor: ``[..., out_dim]`` in the dtype of ``input``.
        """
        y: torch.Tensor = _MatmulNF4.apply(input, self.weight)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


def quantize_linears(module: nn.Module) -> None:
    """Replace, in place, every ``nn.Linear`` below ``module`` by an :class:`NF4Linear`.

    Args:
        module (nn.Module): typically the layers of a backbone, on the meta device or with weights.
    """
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, NF4Linear(child.weight, child.bias))
        else:
            quantize_linears(child)
