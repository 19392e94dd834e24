"""Bytes of a frozen backbone, as it is stored and as sharding gathers it."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qst_tune.backbone.torchtune_loading import SIDE_PREFIX
from qst_tune.backbone.transformers import transformers_backbone
from qst_tune.errors import UserError
from qst_tune.modules.backbone_formats import QuantizedLinear
from qst_tune.modules.memory import GIB, tensor_bytes
from qst_tune.modules.plain_parts import plain_parts

_LARGEST_SHARE = 0.8  # of a device's memory, for a backbone


def is_side(path: str) -> bool:
    """Whether a module of this path belongs to the side network."""
    return f"{path}.".startswith(SIDE_PREFIX)


def backbone_bytes(model: nn.Module) -> int:
    """Bytes of a backbone as it is stored, all of it and without what trains.

    ``model`` may be on meta, and is not sharded.
    """
    return _frozen_bytes(m for path, m in model.named_modules() if not is_side(path))


def gathered_groups(model: Any) -> list[nn.Module]:
    """Return what is gathered and freed by itself, in the order in which it runs.

    These are the layers, and an embedding that is not the LM head too. ``model`` is not sharded.
    """
    groups: list[nn.Module] = list(model.layers)
    if not is_tied(model):
        groups.insert(0, model.tok_embeddings)
    return groups


def is_tied(model: Any) -> bool:
    """Whether the LM head reads the embedding's weight; torchtune's such heads are no linears."""
    backbone = transformers_backbone(model)
    if backbone is not None:
        head = backbone.model.get_output_embeddings()
        return head.weight is backbone.embedding.weight
    return not isinstance(model.output, nn.Linear | QuantizedLinear)


def group_bytes(model: Any) -> tuple[list[int], int]:
    """Return the bytes of each group that is freed as soon as it has run, and of the rest.

    The rest, final norm, head and a tied embedding, is whole during a step.
    """
    groups = [_frozen_bytes(group.modules()) for group in gathered_groups(model)]
    return groups, backbone_bytes(model) - sum(groups)


def _frozen_bytes(modules: Iterable[nn.Module]) -> int:
    """Of what is frozen in these modules, without their children; a tied weight counts once."""
    parts = [p for m in modules for p in plain_parts(m).values() if not p.requires_grad]
    return sum(tensor_bytes(part) for part in {id(part): part for part in parts}.values())


def check_fits(model: nn.Module, device: torch.device) -> None:
    """Refuse a whole backbone, on meta, that takes more than 80 % of a CUDA device.

    The rest is for the side network's activations; the UserError says what to set. Elsewhere
    nothing is checked.
    """
    if device.type != "cuda":
        return
    needed, there = backbone_bytes(model), torch.cuda.get_device_properties(device).total_memory
    if needed > _LARGEST_SHARE * there:
        raise UserError(
            f"the backbone takes {needed / GIB:.1f} GiB and {device} has {there / GIB:.1f} GiB: "
            "set backbone_sharding=full and start at least "
            f"{math.ceil(needed / (_LARGEST_SHARE * there))} processes with --nproc_per_node"
        )
