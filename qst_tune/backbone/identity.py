"""Which frozen backbone a result belongs to."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qst_tune.backbone.directory import read_weights_file


@dataclass(frozen=True)
class BackboneId:
    """What a result was trained on.

    Args:
        name (str): the model's hub name, or the name of its directory.
        fingerprint (str): of its weights, from ``load_backbone``.
        quantization (str): how it is stored, from ``quantization_of_backbone``: "nf4", "none",
            "int4, groups of 64, rtn", "nf4; embedding int8" and the like.
        revision (str): commit of a hub name; "" for a directory.
        library (str): whose modules computed the hidden states, "torchtune" or "transformers".
    """

    name: str
    fingerprint: str
    quantization: str
    revision: str = ""
    library: str = "torchtune"


_SAMPLES = 64


def weight_sample(weight: torch.Tensor) -> torch.Tensor:
    """Return a few dozen evenly spaced values, fp32 on the CPU."""
    stride = max(1, weight.numel() // _SAMPLES)
    return weight.detach().reshape(-1)[::stride].cpu().float().contiguous()


def weight_digest(weight: torch.Tensor) -> str:
    """Hash a weight's shape and its sample: equal for fp32 and for the 16 bits that it came from.

    A view of a memory-mapped file will do: little of it is read.
    """
    sample = weight_sample(weight).numpy().tobytes()
    return hashlib.sha256(repr(tuple(weight.shape)).encode() + sample).hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """Hash the digests of a model's weights, by their names."""
    summary = "".join(f"{name}:{digests[name]};" for name in sorted(digests))
    return hashlib.sha256(summary.encode()).hexdigest()


def fingerprint_files(paths: Iterable[Path]) -> str:
    """Identify the weights in files by their names there, however they are spread over the files.

    UserError if a file cannot be read.
    """
    weights = (item for path in paths for item in read_weights_file(path).items())
    return fingerprint({name: weight_digest(weight) for name, weight in weights})
