"""A frozen backbone that is spread over the processes: FSDP2 gathers each layer when it runs.

Each tensor of the backbone, codes and scales alike, is cut along its first dimension, and every
process keeps a part. ``fully_shard`` gathers a layer before its forward pass, prefetches the next
one and frees the layer behind it. What trains stays whole on every process: it is megabytes, and
its gradients are summed as without sharding. Nothing else crosses processes.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable
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

from qst_tune.distributed.processes import sum_over_ranks
from qst_tune.errors import UserError
from qst_tune.modules.backbone_formats import QuantizedLinear
from qst_tune.modules.loss import zero_loss
from qst_tune.modules.memory import GIB
from qst_tune.modules.plain_parts import Place, expose_parts, plain_parts, read_from
from qst_tune.modules.qst_decoder import QSTDecoder
from qst_tune.modules.qst_model import QSTModel, is_side

META = torch.device("meta")
_LARGEST_SHARE = 0.8  # of a device's memory, for a backbone


@dataclass(frozen=True)
class Sharding:
    """Over which processes a backbone is spread."""

    mesh: DeviceMesh  # one-dimensional; this process is in it
    offload: bool = False  # keep this process's part in the host's memory

    def rows(self, num_rows: int) -> slice:
        """Which of a tensor's rows this process keeps, perhaps none, as FSDP2 cuts it."""
        count = -(-num_rows // self.mesh.size())
        start = min(count * self.mesh.get_local_rank(), num_rows)
        return slice(start, min(start + count, num_rows))


def choose_sharding(
    mode: str | None, device: torch.device, *, offload: bool = False
) -> Sharding | None:
    """Choose the processes that share one backbone. Collective: call it on all ranks.

    With ``mode`` "full" it is all of them, with "node" those of one machine, so that gathering
    never leaves it; None if each process keeps the whole backbone. UserError if machines are to
    share it that have different numbers of processes.
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
    """Shards the backbone of a model on meta, in place, and keeps this process's parts of it."""

    def __init__(self, model: Any, sharding: Sharding, device: torch.device) -> None:
        self.sharding = sharding
        groups: list[Any] = gathered_groups(model)
        self._places, self._tied = _expose(model)
        _shard(model, groups, sharding)
        for place in self._places.values():
            _allocate(place, device, sharding)

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """This process's tensors, by name: other ones after a first pass, for which FSDP pads."""
        return {name: _local(place.tensor) for name, place in self._places.items()}

    def keep(self, path: str, module: nn.Module) -> None:
        """Keep this process's rows of the tensors of an unsharded module, by its path in the model.

        Those on meta are skipped. UserError if it is stored otherwise than the model's.
        """
        for name, part in plain_parts(module).items():
            key = f"{path}.{name}"
            if part.is_meta or f"{path}.{name.partition('/')[0]}" in self._tied:
                continue
            place = self._places.get(key)
            kept = None if place is None else _local(place.tensor)
            rows = part
            if kept is not None and kept.shape != part.shape:
                rows = part[self.sharding.rows(len(part))]
            if kept is None or kept.shape != rows.shape:
                raise UserError(
                    f"backbone_sharding: {path} is stored otherwise than config.json says, which "
                    "cannot be sharded; leave backbone_sharding out, or quantise another directory"
                )
            kept.copy_(rows)

    def take(self, path: str, module: nn.Module) -> None:
        """Keep this process's rows, and leave empty tensors on meta."""
        self.keep(path, module)
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                module._parameters[name] = _empty()
        if isinstance(module, QuantizedLinear):
            for name, _ in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty(0, device=META)


def take_part(
    model: nn.Module, device: torch.device, run: Callable[[torch.Tensor], Any] | None = None
) -> None:
    """Run a sharded model on one token, so that the processes that have a batch get its weights.

    ``run`` goes through the layers as these do, if not by calling the model once. Gradients are
    zeros, if they are on. It does nothing to a model that is not sharded.
    """
    if not isinstance(model, FSDPModule):
        return
    loss = zero_loss((run or model)(torch.zeros(1, 1, dtype=torch.int64, device=device)))
    if loss.requires_grad:
        loss.backward()


def anyone_has(batch: object, model: nn.Module, device: torch.device) -> bool:
    """Return whether a process has a batch left, of a sharded model any process: collective."""
    if not isinstance(model, FSDPModule):
        return batch is not None
    return bool(sum_over_ranks(torch.tensor(float(batch is not None), device=device)))


def free_weights(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass has left whole, such as the LM head.

    Otherwise the first process alone would free it when it reads the state dict to save, and wait
    for the others to gather it again.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def backbone_bytes(model: nn.Module) -> int:
    """Bytes of a backbone as it is stored, without what trains; it may be on meta."""
    return _frozen_bytes(m for path, m in model.named_modules() if not is_side(path))


def gathered_groups(model: Any) -> list[nn.Module]:
    """Return what is gathered by itself, in order: an embedding that is no LM head, the layers."""
    groups: list[nn.Module] = list(model.layers)
    if not is_tied(model):
        groups.insert(0, model.tok_embeddings)
    return groups


def layers_with_backward(model: Any) -> list[Any]:
    """Return the layers through which a gradient flows, which gathers them once more: the last."""
    layers = list(model.layers)
    if not isinstance(model, QSTModel):
        return layers
    lora: Any = model.side.lora
    return [] if lora is None else layers[lora.first :]


def is_tied(model: Any) -> bool:
    """Whether the LM head reads the embedding's weight; torchtune's such heads are no linears."""
    is_tied: bool = getattr(
        model, "is_tied", not isinstance(model.output, nn.Linear | QuantizedLinear)
    )
    return is_tied


def group_bytes(model: Any) -> tuple[list[int], int]:
    """Bytes of each gathered group, and of the rest: the final norm, the head, a tied embedding."""
    groups = [_frozen_bytes(group.modules()) for group in gathered_groups(model)]
    return groups, backbone_bytes(model) - sum(groups)


def _frozen_bytes(modules: Iterable[nn.Module]) -> int:
    """Of what is frozen in these modules; a tied weight counts once."""
    parts = [p for m in modules for p in plain_parts(m).values() if not p.requires_grad]
    return sum(part.nbytes for part in {id(part): part for part in parts}.values())


def check_memory(model: nn.Module, device: torch.device) -> None:
    """Refuse, with a UserError, a whole backbone that takes more than 80 % of a CUDA device."""
    if device.type != "cuda":
        return
    needed, there = backbone_bytes(model), torch.cuda.get_device_properties(device).total_memory
    if needed > _LARGEST_SHARE * there:
        raise UserError(
            f"the backbone takes {needed / GIB:.1f} GiB and {device} has {there / GIB:.1f} GiB: "
            "set backbone_sharding=full and start at least "
            f"{math.ceil(needed / (_LARGEST_SHARE * there))} processes with --nproc_per_node"
        )


def _expose(model: nn.Module) -> tuple[dict[str, Place], set[str]]:
    """Return the places of all parts by name, and the names of tied weights, which have none."""
    places: dict[str, Place] = {}
    owners: dict[int, tuple[nn.Module, str]] = {}
    tied: set[str] = set()
    for path, module in list(model.named_modules()):
        if is_side(path):
            continue
        for name, tensor in list(module.named_parameters(recurse=False)):
            owner = owners.setdefault(id(tensor), (module, name))
            if owner[0] is not module:
                read_from(module, name, *owner)
                tied.add(f"{path}.{name}")
        exposed = expose_parts(module)
        places.update({f"{path}.{name}": place for name, place in exposed.items()})
    return places, tied


def _shard(model: Any, groups: list[Any], sharding: Sharding) -> None:
    """A group for each layer and for an untied embedding; the rest is gathered for a whole step."""
    settings: dict[str, Any] = {
        "mesh": sharding.mesh,
        "offload_policy": _offload_policy(sharding),
        "ignored_params": {p for p in model.parameters() if p.requires_grad or not p.numel()},
    }
    for group in groups:
        # A QSTDecoder frees a layer itself, since it may run it several times a step.
        reshard = not isinstance(model, QSTDecoder)
        fully_shard(group, reshard_after_forward=reshard, **settings)
    fully_shard(model, **settings)
    for group, following in itertools.pairwise(groups):
        group.set_modules_to_forward_prefetch([following])
    _prefetch_backward(model)
    if isinstance(model, QSTModel):
        register_fsdp_forward_method(model, "with_reference")


def _prefetch_backward(model: Any) -> None:
    """Let FSDP2 prefetch for backward what has a backward pass, from the last layer down.

    By itself it would also gather the layer below, or h_0. A module that "prefetches" itself is
    whole at that moment: it prefetches nothing.
    """
    layers = layers_with_backward(model)
    model.set_modules_to_backward_prefetch(layers[-1:] or [model])
    for before, layer in zip([*layers[:1], *layers[:-1]], layers, strict=True):
        layer.set_modules_to_backward_prefetch([before])


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


def _empty() -> nn.Parameter:
    empty = nn.Parameter(torch.empty(0, device=META), requires_grad=False)
    empty._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark
    return empty


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
