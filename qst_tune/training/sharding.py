"""A frozen backbone that is spread over the processes: FSDP2 gathers each layer when it runs.

Each tensor of the backbone, codes and scales alike, is cut along its first dimension into as many
parts as there are processes, and every process keeps one. ``fully_shard`` gathers a layer before
its forward pass, prefetches the next one meanwhile and frees the layer behind it. What trains, a
side network or PEQA's scales, stays whole on every process: it is megabytes, and its gradients are
summed as without sharding. So nothing but frozen codes and those gradients ever crosses processes.
"""

import itertools
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torchtune.modules import TransformerDecoder

from qst_tune.errors import UserError
from qst_tune.modules.base_quantization import QuantizedLinear
from qst_tune.modules.plain_parts import Place, expose_parts, plain_parts
from qst_tune.modules.qst_decoder import QSTDecoder
from qst_tune.modules.rotary_caches import build_rotary_caches
from qst_tune.training.backbone_cache import backbone_cache
from qst_tune.training.backbone_loading import SIDE_PREFIX, read_weights, set_weight
from qst_tune.training.distributed import sum_over_ranks
from qst_tune.training.loss import zero_loss
from qst_tune.training.memory import GIB, tensor_bytes

META = torch.device("meta")
_LARGEST_SHARE = 0.8  # of a device's memory, for a backbone


@dataclass(frozen=True)
class Sharding:
    """Over which processes a backbone is spread.

    Args:
        mesh (DeviceMesh): one-dimensional; this process is in it.
        offload (bool): keep this process's part in the host's memory.
    """

    mesh: DeviceMesh
    offload: bool = False

    @property
    def name(self) -> str:
        """Of this process's part, for a file."""
        return f"{self.mesh.get_local_rank()}-of-{self.mesh.size()}"

    def rows(self, num_rows: int) -> slice:
        """Tell which rows of a tensor this process keeps, as FSDP2 cuts it.

        Args:
            num_rows (int): length of the first dimension.

        Returns:
            slice: may be empty.
        """
        count = -(-num_rows // self.mesh.size())
        start = min(count * self.mesh.get_local_rank(), num_rows)
        return slice(start, min(start + count, num_rows))


def choose_sharding(
    mode: str | None, device: torch.device, *, offload: bool = False
) -> Sharding | None:
    """Choose the processes that share one backbone. Collective: call it on all ranks.

    Args:
        mode (str | None): "full": all of them; "node": those of one machine, so that gathering
            never leaves it; None: each has its own.
        device (torch.device): of this process.
        offload (bool): keep the parts in the host's memory.

    Returns:
        Sharding | None: None if each process keeps the whole backbone.

    Raises:
        UserError: if machines are to share it that have different numbers of processes.
    """
    if mode is None or not dist.is_initialized():
        return None
    size = dist.get_world_size()
    if mode == "full":
        return Sharding(init_device_mesh(device.type, (size,)), offload)
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    if per_node == 1:
        return None
    if size % per_node:
        raise UserError(
            f"backbone_sharding=node: {size} processes are not {per_node} on each machine; start "
            "as many on each, or use full"
        )
    names = ("node", "shard")
    mesh = init_device_mesh(device.type, (size // per_node, per_node), mesh_dim_names=names)
    return Sharding(mesh["shard"], offload)


class ShardedBackbone:
    """The parts of a backbone that this process keeps.

    Args:
        model (TransformerDecoder): built on meta; changed in place: its backbone is sharded, its
            parts are empty tensors. What trains, and a side network, is left alone.
        sharding (Sharding): over which processes.
        device (torch.device): where the model shall compute.
    """

    def __init__(self, model: TransformerDecoder, sharding: Sharding, device: torch.device) -> None:
        self.sharding = sharding
        places = _expose(model)
        _shard(model, sharding)
        for place in places.values():
            _allocate(place, device, sharding)
        self.parts = {name: _local(place.tensor) for name, place in places.items()}

    def keep(self, path: str, module: nn.Module) -> None:
        """Keep this process's rows of what a module holds.

        Args:
            path (str): the module's in the model.
            module (nn.Module): its twin, not sharded; what is still on meta is passed over.
        """
        for name, part in plain_parts(module).items():
            if not part.is_meta:
                kept = self.parts[f"{path}.{name}"]
                is_whole = kept.shape == part.shape
                kept.copy_(part if is_whole else part[self.sharding.rows(len(part))])


@torch.no_grad()
def load_sharded_backbone(
    model: TransformerDecoder,
    twin: TransformerDecoder,
    checkpointer: Any,
    sharding: Sharding,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """Load a checkpoint as ``load_backbone`` does, keeping of each weight only this process's part.

    A process holds no more than its parts and one whole weight. It still has to read every weight:
    the scales of a 4-bit weight are quantised together, so its part cannot be made of a part. With
    a ``cache_dir`` the next start on as many processes reads the parts alone.

    Args:
        model (TransformerDecoder): built on meta; changed in place: filled and sharded.
        twin (TransformerDecoder): another one built alike; used to quantise, and on meta again
            afterwards.
        checkpointer (Any): one of torchtune's checkpointers, or ours, not loaded yet.
        sharding (Sharding): over which processes.
        dtype (torch.dtype): of what is not quantised, and of the values that codes stand for.
        device (torch.device): where the model shall compute.

    Returns:
        str: the checkpoint's fingerprint, as ``load_backbone``.

    Raises:
        UserError: as ``load_backbone``.
    """
    sharded = ShardedBackbone(model, sharding, device)

    def place(name: str, weight: torch.Tensor) -> None:
        path = name.rpartition(".")[0]
        set_weight(twin, name, weight, dtype=dtype, device=device)
        sharded.keep(path, twin.get_submodule(path))
        set_weight(twin, name, weight, dtype=dtype, device=META)

    cache = backbone_cache(checkpointer, twin, dtype, shard=sharding.name)
    fingerprint = cache.load_parts(sharded.parts) if cache else None
    if fingerprint is None:
        fingerprint = read_weights(twin, checkpointer, place)
        if cache:
            cache.save_parts(sharded.parts, fingerprint)
    build_rotary_caches(model.layers, device)
    return fingerprint


def take_part(model: nn.Module, device: torch.device) -> None:
    """Run a model on one token, for nothing but to gather its weights together with the others.

    A process without a batch of its own calls it once for each batch of the others, which would
    wait for its part of the weights for ever. It does nothing to a model that is not sharded.

    Args:
        model (nn.Module): as the others run it; gradients are zeros, if they are on.
        device (torch.device): the model's.
    """
    if not isinstance(model, FSDPModule):
        return
    loss = zero_loss(model(torch.zeros(1, 1, dtype=torch.int64, device=device)))
    if loss.requires_grad:
        loss.backward()


def anyone_has(batch: object, model: nn.Module, device: torch.device) -> bool:
    """Tell whether a process has a batch left. Collective if the model is sharded.

    Args:
        batch (object): this process's, or None.
        model (nn.Module): not sharded, only this process counts.
        device (torch.device): the model's.

    Returns:
        bool: the same on all processes of a sharded model.
    """
    if not isinstance(model, FSDPModule):
        return batch is not None
    return bool(sum_over_ranks(torch.tensor(float(batch is not None), device=device)))


def free_weights(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass has left whole, such as the LM head.

    Otherwise it would be freed by whatever reads the model's state dict next, which is the first
    process alone when it saves: the others would not gather again when it has to.

    Args:
        model (nn.Module): nothing is done to one that is not sharded.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def backbone_bytes(model: TransformerDecoder) -> int:
    """Bytes of a backbone as it is stored, all of it and without what trains.

    Args:
        model (TransformerDecoder): may be on meta; not sharded.

    Returns:
        int: bytes.
    """
    return sum(_own_bytes(m) for path, m in model.named_modules() if not _is_side(path))


def group_bytes(model: TransformerDecoder) -> tuple[list[int], int]:
    """Bytes of what is gathered together when a backbone is sharded.

    Args:
        model (TransformerDecoder): as for :func:`backbone_bytes`.

    Returns:
        tuple[list[int], int]: of each group that is freed as soon as it has run; and of the rest,
        final norm, head and a tied embedding, which is whole during a step.
    """
    groups = [sum(map(_own_bytes, group.modules())) for group in _groups(model)]
    return groups, backbone_bytes(model) - sum(groups)


def _own_bytes(module: nn.Module) -> int:
    """Of what is frozen in a module, without its children."""
    return sum(tensor_bytes(p) for p in plain_parts(module).values() if not p.requires_grad)


def _is_side(path: str) -> bool:
    return f"{path}.".startswith(SIDE_PREFIX)


def check_fits(model: TransformerDecoder, device: torch.device) -> None:
    """Refuse a whole backbone that takes more than 80 % of a CUDA device.

    The rest is for the side network's activations. Elsewhere nothing is checked.

    Args:
        model (TransformerDecoder): on meta.
        device (torch.device): where it shall live.

    Raises:
        UserError: naming what to set.
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


def _expose(model: TransformerDecoder) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for path, module in list(model.named_modules()):
        if not _is_side(path):
            exposed = expose_parts(module)
            places.update({f"{path}.{name}": place for name, place in exposed.items()})
    return places


def _shard(model: TransformerDecoder, sharding: Sharding) -> None:
    """A group for each layer and for an untied embedding; the rest is gathered for a whole step."""
    runs_backward = not isinstance(model, QSTDecoder)
    settings: dict[str, Any] = {
        "mesh": sharding.mesh,
        "offload_policy": _offload_policy(sharding),
        "ignored_params": {p for p in model.parameters() if p.requires_grad},
    }
    groups: list[Any] = _groups(model)
    for group in groups:
        # A QSTDecoder frees a layer itself, since it may run it several times a step.
        fully_shard(group, reshard_after_forward=runs_backward, **settings)
    fully_shard(model, **settings)
    for group, following in itertools.pairwise(groups):
        group.set_modules_to_forward_prefetch([following])
    _prefetch_backward(model)
    if isinstance(model, QSTDecoder):
        register_fsdp_forward_method(model, "with_reference")


def _prefetch_backward(model: Any) -> None:
    """By default FSDP2 prefetches whatever ran before, needed or not.

    For a side network that would be the last layer, and for PEQA the embedding, which both have no
    backward pass. A module that "prefetches" itself is whole at that moment: it prefetches nothing.
    """
    has_side_network = isinstance(model, QSTDecoder)
    if has_side_network:
        model.set_modules_to_backward_prefetch([model])
        return
    layers = list(model.layers)
    model.set_modules_to_backward_prefetch([layers[-1]])
    for before, layer in zip([layers[0], *layers[:-1]], layers, strict=True):
        layer.set_modules_to_backward_prefetch([before])


def _groups(model: TransformerDecoder) -> list[nn.Module]:
    """What is gathered and freed by itself, in the order in which it runs."""
    groups: list[nn.Module] = list(model.layers)
    if isinstance(model.output, nn.Linear | QuantizedLinear):  # otherwise the head reads it too
        groups.insert(0, model.tok_embeddings)
    return groups


def _offload_policy(sharding: Sharding) -> OffloadPolicy:
    is_cuda = sharding.mesh.device_type == "cuda"
    return CPUOffloadPolicy(pin_memory=is_cuda) if sharding.offload else OffloadPolicy()


def _allocate(place: Place, device: torch.device, sharding: Sharding) -> None:
    """Take a tensor from meta to memory, of a sharded one only the part that is kept."""
    tensor = place.tensor
    if not isinstance(tensor, DTensor):
        place.put(torch.empty_like(tensor, device=device))
        return
    where = torch.device("cpu") if sharding.offload else device
    local = torch.empty_like(tensor.to_local(), device=where)
    shape, stride = tensor.shape, tensor.stride()
    place.put(
        DTensor.from_local(local, tensor.device_mesh, tensor.placements, shape=shape, stride=stride)
    )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
