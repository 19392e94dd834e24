"""Reads a file of weights, and nothing but weights: no code of it is run."""

from pathlib import Path

import torch
from safetensors import safe_open

from qst_tune.errors import UserError


def read_weights_file(path: Path) -> dict[str, torch.Tensor]:
    """Open a file, safetensors or torch's ``.bin``, and return its weights by name.

    They are memory-mapped, so that little is read before it is used; a ``.bin`` from before torch
    1.6 cannot be mapped and is read whole. UserError if the file is damaged or has more than
    tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _read_bin(path)
    except Exception as error:  # each format has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged, or has more than weights: {reason}") from error


def _read_bin(path: Path) -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # else from before torch 1.6
    weights: dict[str, torch.Tensor] = torch.load(
        path, map_location="cpu", weights_only=True, mmap=is_zip or None
    )
    return weights
