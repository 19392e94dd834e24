"""The caches of rotary embeddings, which no checkpoint holds."""

from typing import Any

import torch
from torch import nn


def build_rotary_caches(module: nn.Module, device: torch.device) -> None:
    """Compute, in place, the cache of every rotary embedding below a module built on meta.

    Args:
        module (nn.Module): typically a backbone's layers.
        device (torch.device): where the caches shall be.
    """
    ropes: list[Any] = [child for child in module.modules() if hasattr(child, "rope_init")]
    with device:
        for rope in ropes:
            rope.rope_init()
