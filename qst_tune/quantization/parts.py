"""The plain tensors that a quantised one consists of."""

import dataclasses
from collections.abc import Mapping

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.dtypes.nf4tensor import NF4Tensor


def parts_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the plain tensors in a quantised one by name, not copied; none of a plain tensor.

    torchao's ``NF4Tensor`` has codes, absmax codes, their factors and mean, and the 16 levels.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return {}
    names, _ = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}


def named_parts(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name the plain tensors of any tensor as files and sharding do; none is copied.

    Those of a quantised one are ``name/quantized_data`` and so on; a plain one has its own name.
    """
    parts = parts_of(tensor)
    return {f"{name}/{part}": value for part, value in parts.items()} or {name: tensor}


def join_parts(parts: Mapping[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Undo :func:`parts_of`, on the device of the parts.

    ``like`` is a quantised tensor of the same shape and format on any device. An NF4 weight gets
    the dtype of its levels.
    """
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
