"""The plain tensors that quantised ones consist of, so that FSDP shards them and files store them.

FSDP2 shards parameters along their first dimension. A quantised weight is one tensor to a module
but several in memory: torchao's own sharding of NF4 needs a number of second-level blocks that is a
multiple of the number of processes, which a 576 x 576 weight does not have. Codes, absmax codes and
factors can be cut anywhere as parameters of their own.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.dtypes.nf4tensor import NF4Tensor

from qst_tune.modules.peqa_linear import PEQALinear

_SMALL = 16  # numbers, such as the levels of NF4: each process has all of them


@dataclass(frozen=True)
class Place:
    """A parameter or buffer of a module, by its name there."""

    owner: nn.Module
    name: str

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor that is there now."""
        tensor: torch.Tensor = getattr(self.owner, self.name)
        return tensor

    def put(self, tensor: torch.Tensor) -> None:
        """Exchange it; it becomes a parameter where one was, trainable if that was."""
        before = self.tensor
        if isinstance(before, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=before.requires_grad)
        setattr(self.owner, self.name, tensor)


def plain_parts(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a checkpoint fills of a module, without its children, as plain tensors.

    The parts of a quantised ``weight`` are called ``weight/quantized_data`` and so on. The module
    must not have been changed by :func:`expose_parts`. Nothing is copied.
    """
    parts: dict[str, torch.Tensor] = {}
    for name, tensor in module.named_parameters(recurse=False):
        parts.update(named_parts(name, tensor))
    if isinstance(module, PEQALinear):
        parts.update(module.named_buffers(recurse=False))
    return parts


def expose_parts(module: nn.Module) -> dict[str, Place]:
    """Make the parts of a module, without its children, frozen parameters of their own, in place.

    A quantised weight is joined from its parts at each access. Returns where each of the
    :func:`plain_parts` is now.
    """
    places: dict[str, Place] = {}
    for name, tensor in list(module.named_parameters(recurse=False)):
        places.update(_expose(module, name, tensor) or {name: Place(module, name)})
    if isinstance(module, PEQALinear):
        for name, buffer in list(module.named_buffers(recurse=False)):
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
            places[name] = Place(module, name)
    return places


def _expose(module: nn.Module, name: str, tensor: torch.Tensor) -> dict[str, Place]:
    """Expose the parts of a quantised tensor; a plain one has none."""
    parts = parts_of(tensor)
    if not parts:
        return {}
    joined = _Join(tensor)
    parametrize.register_parametrization(module, name, joined, unsafe=True)
    originals: Any = module.parametrizations[name]  # type: ignore[index]
    places = {part: Place(joined, part) for part in parts if part not in joined.large}
    places |= {p: Place(originals, f"original{i}") for i, p in enumerate(joined.large)}
    return {f"{name}/{part}": place for part, place in places.items()}


def read_from(module: nn.Module, name: str, owner: nn.Module, own_name: str) -> None:
    """Let a parameter, in place, be read from another module, as a tied LM head does."""
    setattr(module, name, nn.Parameter(torch.empty(0), requires_grad=False))
    read = _Read(owner, own_name)
    parametrize.register_parametrization(module, name, read, unsafe=True)


class _Read(nn.Module):
    """A parametrisation: what another module has."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self._where = (owner, name)  # in a tuple: the owner is no submodule

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        owner, name = self._where
        tensor: torch.Tensor = getattr(owner, name)
        return tensor


class _Join(nn.Module):
    """A parametrisation: a quantised tensor of its large parts, which become parameters."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._like = [tensor]  # in a list: neither parameter nor buffer
        self.large = [name for name, part in parts_of(tensor).items() if part.numel() > _SMALL]
        for name, part in parts_of(tensor).items():
            if name not in self.large:
                self.register_buffer(name, part)

    def forward(self, *large: torch.Tensor) -> torch.Tensor:
        parts = dict(zip(self.large, large, strict=True))
        return join_parts({**parts, **dict(self.named_buffers())}, self._like[0])

    def right_inverse(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = parts_of(tensor)
        return tuple(parts[name] for name in self.large)


def parts_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the plain tensors in a quantised one by name, not copied; none of a plain tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        return {}
    names, _ = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}


def named_parts(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name the plain tensors of any tensor: ``name/quantized_data`` and so on, or ``name``."""
    parts = parts_of(tensor)
    return {f"{name}/{part}": value for part, value in parts.items()} or {name: tensor}


def join_parts(parts: Mapping[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Undo :func:`parts_of`, on the device of the parts, in the shape and format of ``like``."""
    quantized: type = type(like)
    names, context = like.__tensor_flatten__()  # type: ignore[attr-defined]
    if isinstance(like, NF4Tensor):
        device, dtype = parts[names[0]].device, parts["nf4"].dtype
        layout = dataclasses.replace(context["tensor_meta"], device=device, dtype=dtype)
        context = {**context, "tensor_meta": layout}
    joined: torch.Tensor = quantized.__tensor_unflatten__(  # type: ignore[attr-defined]
        dict(parts), context, like.shape, like.stride()
    )
    return joined
