"""Which frozen backbone a result belongs to: digests of all bytes of its weights."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Semaphore
from typing import NamedTuple

import torch

from qst_tune.backbone.directory import read_weights_file
from qst_tune.errors import UserError

_CHUNK = 2**22  # values that are hashed at once
_SAMPLES = 64
_THREADS = max(1, min(4, os.cpu_count() or 1))  # of 0.5 GB/s each
_NARROW = (torch.bfloat16, torch.float16, torch.float32)


class Fingerprint(NamedTuple):
    """Hashes of a model's weights: names, shapes and values, in whatever files and precision.

    ``full`` is of all values. ``sampled`` is of 64 values of each weight: the one that results
    until 0.1 have.
    """

    full: str
    sampled: str


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
        sampled (str): the weaker fingerprint of results until 0.1, known of what is here.
    """

    name: str
    fingerprint: str
    quantization: str
    revision: str = ""
    library: str = "torchtune"
    sampled: str = field(default="", repr=False, compare=False)

    def described(self) -> dict[str, str]:
        """Return what a result's description says of it."""
        return {name: value for name, value in asdict(self).items() if name != "sampled"}


class WeightDigests:
    """Digests of a model's weights, computed by threads while its reader goes on.

    Few weights wait at a time, so that they are not all in memory.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS)
        self._room = Semaphore(2 * _THREADS)
        self._digests: dict[str, Future[tuple[str, str]]] = {}

    def add(self, name: str, weight: torch.Tensor) -> None:
        """Hash a weight, perhaps a view of a memory-mapped file, unless its name was added."""
        if name in self._digests:
            return
        self._room.acquire()
        self._digests[name] = self._threads.submit(_checked_digests, name, weight)
        self._digests[name].add_done_callback(lambda _: self._room.release())

    def fingerprint(self) -> Fingerprint:
        """Wait for all; UserError if a weight has a value that is not finite."""
        found = {name: digest.result() for name, digest in sorted(self._digests.items())}
        self._threads.shutdown()
        full = _joined({name: digest for name, (digest, _) in found.items()})
        return Fingerprint(full, _joined({name: old for name, (_, old) in found.items()}))


def fingerprint_files(paths: Iterable[Path]) -> Fingerprint:
    """Identify the weights in files by their names there, however they are spread over the files.

    UserError if a file cannot be read.
    """
    digests = WeightDigests()
    for path in paths:
        for name, weight in read_weights_file(path).items():
            digests.add(name, weight)
    return digests.fingerprint()


def weight_digest(weight: torch.Tensor) -> str:
    """Hash a weight's shape and all values: equal for fp32 and for the 16 bits that it came from.

    Each 4 M values are hashed in the narrowest of bf16, fp16 and fp32 that has them exactly.
    """
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
    for chunk in weight.detach().reshape(-1).split(_CHUNK):
        narrow = _narrowest(chunk.cpu())
        digest.update(str(narrow.dtype).encode())
        digest.update(_bytes_of(narrow))
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash the names, dtypes, shapes and bytes of plain tensors on the CPU, by threads."""

    def digest(tensor: torch.Tensor) -> str:
        facts = repr((str(tensor.dtype), tuple(tensor.shape))).encode()
        return hashlib.sha256(facts + _bytes_digest(tensor)).hexdigest()

    with ThreadPoolExecutor(_THREADS) as threads:
        return _joined(dict(zip(tensors, threads.map(digest, tensors.values()), strict=True)))


def _bytes_digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(_bytes_of(tensor.reshape(-1))).digest()


def _bytes_of(values: torch.Tensor) -> memoryview:
    """The memory of values ``[N]``, not copied if they are contiguous."""
    if values.stride() != (1,):  # that of a single value can be any
        values = values.clone(memory_format=torch.contiguous_format)
    return values.view(torch.uint8).numpy().data


def _narrowest(values: torch.Tensor) -> torch.Tensor:
    if values.dtype not in (torch.float16, torch.float32, torch.float64):
        return values
    for dtype in _NARROW:
        narrow = values.to(dtype)
        if torch.equal(narrow.to(values.dtype), values):
            return narrow
    return values


def _checked_digests(name: str, weight: torch.Tensor) -> tuple[str, str]:
    # Of 8-bit floats every code is finite or one of its own. The sum is of one pass, without copy.
    if weight.is_floating_point() and weight.element_size() > 1:
        is_finite = bool(weight.sum(dtype=torch.float32).isfinite())
        if not is_finite and not bool(weight.isfinite().all()):
            bad = int((~weight.isfinite()).sum())
            raise UserError(
                f"the backbone's weight {name} has {bad} of {weight.numel()} values that are not "
                "finite (NaN or infinite): download the model again"
            )
    return weight_digest(weight), _sampled_digest(weight)


def _sampled_digest(weight: torch.Tensor) -> str:
    """Of the shape and a few dozen evenly spaced values in fp32, as results until 0.1 have it."""
    stride = max(1, weight.numel() // _SAMPLES)
    sample = weight.detach().reshape(-1)[::stride].cpu().float().contiguous()
    return hashlib.sha256(repr(tuple(weight.shape)).encode() + sample.numpy().tobytes()).hexdigest()


def _joined(digests: Mapping[str, str]) -> str:
    """Hash the digests of a model's weights, by their names."""
    summary = "".join(f"{name}:{digests[name]};" for name in sorted(digests))
    return hashlib.sha256(summary.encode()).hexdigest()
