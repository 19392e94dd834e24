"""Numbers that left the range of their dtype: found, and named with the way out."""

import torch
from torch import nn

from qst_tune.errors import UserError

FP16_RANGE = (
    "; dtype=fp16 ends at 65504, and activations of some models (Gemma's among them) exceed it: "
    "use dtype=bf16, or fp32 where the device has no bf16"
)


def overflow_hint(model: nn.Module) -> str:
    """Name the dtype where it may be the cause of a number that is not finite.

    Args:
        model (nn.Module): on any device.

    Returns:
        str: the end of an error message; empty unless the model computes in fp16.
    """
    return FP16_RANGE if any(p.dtype == torch.float16 for p in model.parameters()) else ""


def check_finite(values: torch.Tensor, model: nn.Module, what: str) -> None:
    """Refuse to continue with NaN or infinity.

    Args:
        values (torch.Tensor): what ``model`` computed.
        model (nn.Module): for :func:`overflow_hint`.
        what (str): name of ``values``, for the message.

    Raises:
        UserError: if one of them is not finite.
    """
    if not values.isfinite().all():
        raise UserError(f"{what} of the model are not finite{overflow_hint(model)}")
