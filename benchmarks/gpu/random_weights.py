"""Random weights on a device: time and memory do not depend on their values."""

from typing import Any

import torch
from torch import nn
from torchtune.modules.peft import LoRALinear

from benchmarks.backbones import DTYPE
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.quantization.nf4 import quantize_nf4


class RandomWeights:
    """Fills models that were built on meta.

    Weights of one shape have the same values: quantising all of a 7B model takes 10 s.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._quantized: dict[torch.Size, torch.Tensor] = {}

    def dense(self, shape: torch.Size) -> torch.Tensor:
        """Draw a weight; vectors are ones, as in norms."""
        value = torch.ones(shape, device=self.device, dtype=DTYPE)
        return value.normal_(std=0.02) if value.ndim > 1 else value

    def nf4(self, shape: torch.Size) -> nn.Parameter:
        """Return a weight in NF4; the others of its shape are copies of the first."""
        known = self._quantized.get(shape)
        if known is None:
            known = self._quantized[shape] = quantize_nf4(self.dense(shape))
            return nn.Parameter(known, requires_grad=False)
        return nn.Parameter(known.clone(), requires_grad=False)

    @torch.no_grad()
    def fill_(self, model: nn.Module) -> None:
        """Give a torchtune decoder its weights, in place; a side network is left on meta."""
        for name, module in model.named_modules():
            if name != "side" and not name.startswith("side."):
                self._fill_own(module)

    def _fill_own(self, module: Any) -> None:
        """Fill a module without those below it."""
        if isinstance(module, NF4Linear):
            module.weight = self.nf4(module.weight.shape)
            return
        for key, parameter in module._parameters.items():
            if parameter is not None:
                value = self.dense(parameter.shape)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
        if isinstance(module, LoRALinear):
            module.weight = self.nf4(module.weight.shape)
            module._quantize_base = True
        if hasattr(module, "rope_init"):
            with self.device:
                module.rope_init()
