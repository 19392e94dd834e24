"""What a result's directory contains, without loading a model."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from qst_tune.backbone.identity import BackboneId
from qst_tune.models.load import identify_backbone
from qst_tune.results.described_model import build_any_described, checkpointer_of, directory_format
from qst_tune.results.side_network import SIDE_NETWORK, read_side_network
from qst_tune.results.tuned_directory import load_tuned, read_description, read_tensors


def inspect_directory(directory: Path) -> str:
    """Describe a side network or a set of scales: provenance, results, sizes and gates.

    The directory may be anyone's: no code of it is run. A damaged one is a UserError.
    """
    form = directory_format(directory)
    description = read_description(directory, form)
    tensors = read_tensors(directory, form)
    backbone, structure = description["backbone"], description.get("structure") or {}
    facts = {
        "what": form.title,
        "backbone": f"{backbone['name']} ({backbone['quantization']})",
        **({"revision": backbone["revision"]} if backbone.get("revision") else {}),
        "fingerprint": backbone["fingerprint"],
        "made with": f"qst_tune {description['qst_tune_version']}",
        **{f"model.{name}": value for name, value in description["model"].items()},
        **{f"structure.{name}": value for name, value in structure.items()},
        **{name: f"{value:.4g}" for name, value in description["results"].items()},
        **_sizes(tensors),
    }
    if form is SIDE_NETWORK:
        facts |= _gates(tensors)
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items())


def _sizes(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Parameters and bytes of the whole, and parameters of each part."""
    parts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        parts[name.partition(".")[0]] += tensor.numel()
    num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    return {
        "tensors": f"{len(tensors)} ({dtypes})",
        "parameters": f"{parts.total():,} ({num_bytes / 1e6:.2f} MB)",
        **{f"  {part}": f"{count:,}" for part, count in parts.items()},
        "not finite": sum(not bool(t.isfinite().all()) for t in tensors.values()),
    }


def _gates(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """The share of the carried state that each block takes, from the first to the last."""
    gammas = [t for name, t in sorted(tensors.items(), key=_by_number) if name.endswith(".gamma")]
    betas = [torch.sigmoid(gamma.float()).mean().item() for gamma in gammas]
    upsample = tensors["upsample.weight"].float()
    size = upsample.norm().item() / math.sqrt(upsample.numel())
    return {
        "gates (beta)": " ".join(f"{beta:.3f}" for beta in betas),
        "upsample rms": f"{size:.3g}",
    }


def _by_number(item: tuple[str, torch.Tensor]) -> list[Any]:
    parts = item[0].split(".")
    return [int(part) if part.isdigit() else -1 for part in parts]


def verify_directory(directory: Path, backbone_directory: Path) -> BackboneId:
    """Check that a result belongs to a backbone and is complete, without loading a model.

    Names and shapes of the tensors must be those of the backbone's model; otherwise it is a
    UserError.
    """
    form = directory_format(directory)
    model = build_any_described(directory, form, torch.float32, backbone_directory)
    with checkpointer_of(directory, backbone_directory) as cfg:
        backbone = identify_backbone(model, cfg)
    if form is SIDE_NETWORK:
        read_side_network(directory, model.side, backbone=backbone)
    else:
        load_tuned(form, directory, model.task(), backbone=backbone)
    return backbone
