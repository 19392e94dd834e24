"""What a result's directory contains, without loading a model."""

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from qst_tune.backbone.identity import BackboneId
from qst_tune.models.load import identify_backbone
from qst_tune.modules.qst_model import QSTModel
from qst_tune.results.description import format_of, read_description
from qst_tune.results.loading import build_any_described, tuned_part
from qst_tune.results.peft_adapter import check_adapter
from qst_tune.results.recipe_config import checkpointer_of
from qst_tune.results.tuned_directory import Tensors, read_tensors, read_tuned


def inspect_directory(directory: Path) -> str:
    """Describe a side network or a set of scales: provenance, results, sizes and gates.

    The directory may be anyone's: no code of it is run. A damaged one is a UserError.
    """
    found = read_description(directory)
    tensors = read_tensors(directory, found.form)
    backbone = found.backbone
    structure = asdict(found.structure) if found.structure else {}
    facts = {
        "what": found.title,
        "backbone": f"{backbone.name} ({backbone.quantization})",
        **({"revision": backbone.revision} if backbone.revision else {}),
        "fingerprint": backbone.fingerprint,
        "made with": f"qst_tune {found.version}",
        **{f"model.{name}": value for name, value in found.model.items()},
        **{f"structure.{n}": v for n, v in (structure.pop("config", {}) | structure).items()},
        **{name: f"{value:.4g}" for name, value in found.results.items()},
        **_sizes(tensors),
        **(_gates(tensors) if "upsample.weight" in tensors else {}),
    }
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items())


def verify_directory(directory: Path, backbone_directory: Path) -> BackboneId:
    """Check that a result belongs to a backbone and is complete, without loading a model.

    Names and shapes of the tensors must be those of the backbone's model; otherwise it is a
    UserError.
    """
    model = build_any_described(directory, format_of(directory), torch.float32, backbone_directory)
    backbone = identify_backbone(model, checkpointer_of(directory, backbone_directory))
    tensors = read_tuned(directory, tuned_part(model), backbone=backbone)
    if isinstance(model, QSTModel):
        check_adapter(directory, model, tensors)
    return backbone


def _sizes(tensors: Tensors) -> dict[str, object]:
    """Parameters and bytes of the whole, and parameters of each part."""
    parts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        parts[name.partition(".")[0]] += tensor.numel()
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    return {
        "tensors": f"{len(tensors)} ({dtypes})",
        "parameters": f"{parts.total():,} ({num_bytes / 1e6:.2f} MB)",
        **{f"  {part}": f"{count:,}" for part, count in parts.items()},
        "not finite": sum(not bool(t.isfinite().all()) for t in tensors.values()),
    }


def _gates(tensors: Tensors) -> dict[str, str]:
    """The share of the carried state that each block takes, from the first to the last."""
    names = sorted((n for n in tensors if n.endswith(".gamma")), key=lambda n: (len(n), n))
    betas = [torch.sigmoid(tensors[name].float()).mean().item() for name in names]
    upsample = tensors["upsample.weight"].float()
    size = upsample.norm().item() / math.sqrt(upsample.numel())
    return {
        "gates (beta)": " ".join(f"{beta:.3f}" for beta in betas),
        "upsample rms": f"{size:.3g}",
    }
