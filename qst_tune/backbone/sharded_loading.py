"""Fill a frozen backbone that is spread over processes: each keeps its part of every weight."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtune.modules import TransformerDecoder

from qst_tune.backbone.identity import Fingerprint
from qst_tune.backbone.loading import load_transformers_backbone, repair
from qst_tune.backbone.repair import repair_rank_of
from qst_tune.backbone.sharded_repair import ShardedRepairs
from qst_tune.backbone.torchtune_loading import read_weights, set_weight
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.distributed.sharding import META, ShardedBackbone, Sharding
from qst_tune.modules.backbone_formats import linear_format
from qst_tune.modules.meta_device import build_rotary_caches
from qst_tune.torchtune_compat import checkpoint_directory


@torch.no_grad()
def load_sharded_backbone(
    model: TransformerDecoder,
    twin: TransformerDecoder,
    checkpointer: Any,
    sharding: Sharding,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Fingerprint:
    """Load a checkpoint as one process does, keeping of each weight only this process's part.

    Every process reads every weight, since the scales of a 4-bit weight are quantised together, and
    keeps its part. ``twin`` is another model built alike, which quantises and is on meta again
    afterwards.
    """
    sharded = ShardedBackbone(model, sharding, device)

    def place(name: str, weight: torch.Tensor) -> None:
        path = name.rpartition(".")[0]
        set_weight(twin, name, weight, dtype=dtype, device=device)
        sharded.keep(path, twin.get_submodule(path))
        set_weight(twin, name, weight, dtype=dtype, device=META)

    def rounded(path: str, weight: torch.Tensor) -> nn.Module:
        linear = _another(twin.get_submodule(path))
        holder = nn.ModuleDict({"linear": linear})
        set_weight(holder, "linear.weight", weight, dtype=dtype, device=device)
        return linear

    fingerprint = read_weights(twin, checkpointer, place)
    build_rotary_caches(model.layers, device)
    rank = repair_rank_of(model)
    if rank:
        directory = checkpoint_directory(checkpointer)
        repairs = ShardedRepairs(model, sharded, "", directory, rank, rounded)
        repairs.finish(fingerprint, read_weights(twin, checkpointer, repairs.take))
    return fingerprint


def _another(linear: nn.Module) -> nn.Module:
    """A linear of the same format, without a repair; torchao's NF4 has no deep copy."""
    copied: nn.Module = copy.copy(linear)
    copied._parameters, copied._modules = dict(linear._parameters), {}
    copied._buffers = dict(linear._buffers)
    copied.register_module("repair", None)
    return copied


@torch.no_grad()
def load_sharded_directory(
    model: Any,
    backbone: TransformersBackbone,
    directory: Path,
    sharding: Sharding,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Fingerprint:
    """Shard a model on meta over ``backbone``, and load this process's parts of it."""
    root = next(path for path, m in model.named_modules() if m is backbone.model)
    sharded = ShardedBackbone(model, sharding, device)

    def take(path: str, module: nn.Module) -> None:
        sharded.take(f"{root}.{path}" if path else root, module)

    def rounded(path: str, weight: torch.Tensor) -> nn.Module:
        make = linear_format(backbone.base_quantization)
        assert make is not None  # what is repaired is quantised
        return make(weight.to(device), None)

    fingerprint = load_transformers_backbone(
        backbone, directory, dtype=dtype, device=device, take=take
    )
    rank = repair_rank_of(backbone)
    if rank:
        repairs = ShardedRepairs(model, sharded, root, directory, rank, rounded)
        repair(repairs, backbone, directory, dtype, fingerprint)
    return fingerprint
