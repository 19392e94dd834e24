"""What a side network computes that the names and shapes of its tensors leave open."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qst_tune.errors import UserError
from qst_tune.modules.side.config import SideConfig
from qst_tune.modules.side.network import SideNetwork

# What makes two side networks with equal tensors compute otherwise. The rest of the configuration
# shows in the tensors, acts in training alone, or (hidden_bits) approximates the same function.
_FUNCTION = (
    "layers", "normalize_hidden", "num_heads", "num_kv_heads", "downsample", "activation",
    "output_mix",
)  # fmt: skip


def side_structure(side: SideNetwork) -> dict[str, Any]:
    """Describe a side network, perhaps on meta: its configuration and what follows from it."""
    attn: Any = side.blocks[0].attn
    heads = {"num_heads": attn.num_heads, "num_kv_heads": attn.num_kv_heads}
    return {**asdict(side.config), "layers": side.layers, **heads}


def check_structure(directory: Path, description: Mapping[str, Any], side: SideNetwork) -> None:
    """Refuse a directory whose tensors would compute something else in ``side``.

    One head of 36 and three heads of 12, for one, have the same tensors.
    """
    found, wanted = _described(description), side_structure(side)
    if wanted["downsample"] != "adapter":
        wanted["activation"] = found.get("activation")  # which only an adapter has
    differing = [
        f"{key} {found.get(key)!r} there, {wanted[key]!r} here"
        for key in _FUNCTION
        if found.get(key) != wanted[key]
    ]
    if found.get("reads", "output") != "output":
        differing.append("it reads the input of layers, which this version does not")
    if differing:
        raise UserError(
            f"{directory} has tensors of this shape for another model: {'; '.join(differing)}; use "
            "the model block of its qst_config.json, and for what that leaves to a default the "
            "values there"
        )


def _described(description: Mapping[str, Any]) -> dict[str, Any]:
    found = description.get("structure") or {}
    if "reads" not in found:
        return dict(found)
    # Written before a directory had the whole configuration; its model block has what differs.
    config = asdict(SideConfig.of_block(description["model"]).resolved(1, 1))
    swapped = {"output_mix": "swapped_sigmoid"} if "swapped" in found["output_mix"] else {}
    both = {"downsample", "output_mix"}
    return {**config, **{k: v for k, v in found.items() if k not in both}, **swapped}
