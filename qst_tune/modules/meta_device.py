"""Values for modules that were built on the meta device."""

from typing import Any

import torch
from torch import nn
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules import RMSNorm


def materialize(module: nn.Module, device: torch.device) -> None:
    """Allocate and initialise, in place, a module that was built on meta.

    ValueError if a part of it with parameters has no known initial value.
    """
    module.to_empty(device=device)
    with device:
        for child in module.modules():
            initializer = getattr(child, "reset_parameters", getattr(child, "rope_init", None))
            if initializer is not None:
                initializer()
            elif isinstance(child, RMSNorm):  # has no reset_parameters
                nn.init.ones_(child.scale)
            elif isinstance(child, GemmaRMSNorm):  # neither; it multiplies by 1 + scale
                nn.init.zeros_(child.scale)
            elif list(child.parameters(recurse=False)):  # would stay uninitialised memory
                raise ValueError(
                    f"{type(child).__name__} cannot be initialised in place: it has no "
                    "reset_parameters; build the model on its device instead of on meta"
                )


def build_rotary_caches(module: nn.Module, device: torch.device) -> None:
    """Compute, in place, what no checkpoint has: the caches of torchtune's rotary embeddings."""
    ropes: list[Any] = [child for child in module.modules() if hasattr(child, "rope_init")]
    with device:
        for rope in ropes:
            rope.rope_init()
