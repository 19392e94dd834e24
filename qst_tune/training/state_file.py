"""Nested Python state, such as an optimizer's, as one safetensors and one JSON file: no pickle.

Every tensor goes into the safetensors file under its path in the tree; the JSON file holds the tree
with a mark in the tensor's place. Floats keep all their bits: JSON writes the shortest text that
reads back as the same number.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from qst_tune.errors import UserError

TREE_FILE = "state.json"
TENSORS_FILE = "state.safetensors"

# What a file that was changed raises on the way; too deep a tree is a RuntimeError.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)

# Dicts, lists, tuples, tensors and plain values, in any nesting.
Tree: TypeAlias = Any
State: TypeAlias = dict[str, Tree]

# Marks: a dict with one of these as its only key is something that JSON does not have.
_TENSOR, _TUPLE, _PAIRS, _WRAPPED = "$tensor", "$tuple", "$pairs", "$wrapped"
# Quantized optimizer states, by class name. A file can name these classes and no others.
_WRAPPERS = {
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}


def pack_state(tree: Tree) -> dict[str, bytes]:
    """Turn a tree of dicts, lists, tuples, tensors and plain values into two files by name."""
    tensors: dict[str, torch.Tensor] = {}
    encoded = _encode(tree, "", tensors)
    return {TREE_FILE: json.dumps(encoded).encode(), TENSORS_FILE: save(tensors)}


def unpack_state(directory: Path) -> Tree:
    """Read what :func:`pack_state` was given back, bit for bit, on the CPU.

    UserError if a file is missing or damaged.
    """
    try:
        tensors = load_file(directory / TENSORS_FILE)
        return _decode(json.loads((directory / TREE_FILE).read_text()), tensors)
    except (*_DAMAGE, SafetensorError) as error:
        raise UserError(f"the state in {directory} is damaged: {error}") from error


def _encode(value: Tree, path: str, tensors: dict[str, torch.Tensor]) -> Tree:
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, path, tensors)
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(item, f"{path}.{key}", tensors) for key, item in value.items()}
        pairs = [[key, _encode(item, f"{path}.{key}", tensors)] for key, item in value.items()]
        return {_PAIRS: pairs}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"cannot save {path.lstrip('.')}: a {type(value).__name__} is no plain value")


def _encode_tensor(value: torch.Tensor, path: str, tensors: dict[str, torch.Tensor]) -> Tree:
    kind = type(value).__name__
    if kind in _WRAPPERS:
        names, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {name: _encode(getattr(value, name), f"{path}.{name}", tensors) for name in names}
        return {_WRAPPED: [kind, parts, _encode(list(context), path, tensors)]}
    name = path.lstrip(".")
    # A copy: safetensors refuses two tensors in one storage.
    tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    return {_TENSOR: name}


def _decode(value: Tree, tensors: dict[str, torch.Tensor]) -> Tree:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((mark, content),) = value.items()
        if mark == _TENSOR:
            return tensors[content]
        if mark == _TUPLE:
            return tuple(_decode(item, tensors) for item in content)
        if mark == _PAIRS:
            return {key: _decode(item, tensors) for key, item in content}
        if mark == _WRAPPED:
            kind, parts, context = content
            return _decode_wrapper(kind, parts, context, tensors)
    return {key: _decode(item, tensors) for key, item in value.items()}


def _decode_wrapper(
    kind: str, parts: dict[str, Tree], context: list[Tree], tensors: dict[str, torch.Tensor]
) -> Tree:
    wrapper = getattr(import_module(_WRAPPERS[kind]), kind)
    plain = {name: _decode(part, tensors) for name, part in parts.items()}
    return wrapper.__tensor_unflatten__(plain, _decode(context, tensors))
