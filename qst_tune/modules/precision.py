"""Numbers that left the range of their dtype: found, and named with the way out."""

import torch
from torch import nn

from qst_tune.errors import UserError

FP16_RANGE = (
    "; dtype=fp16 ends at 65504, and activations of some models (Gemma's among them) exceed it: "
    "use dtype=bf16, or fp32 where the device has no bf16"
)


def overflow_hint(model: nn.Module) -> str:
    """Return the end of an error message that names fp16 as the cause; empty in other dtypes."""
    return FP16_RANGE if any(p.dtype == torch.float16 for p in model.parameters()) else ""


def check_finite(values: torch.Tensor, model: nn.Module, what: str) -> None:
    """Refuse NaN or infinity in what ``model`` computed; ``what`` names the values."""
    if not values.isfinite().all():
        raise UserError(f"{what} of the model are not finite{overflow_hint(model)}")
