"""Keep a quantised backbone in a file: the next start reads a quarter of it, and rounds nothing."""

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import utils
from torchtune.modules import TransformerDecoder

from qst_tune import __version__
from qst_tune.modules.embedding_quantization import quantization_of_backbone
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.modules.rotary_caches import build_rotary_caches
from qst_tune.quantization.table import QuantizedTable
from qst_tune.training.backbone_loading import SIDE_PREFIX
from qst_tune.training.distributed import rank_and_world_size
from qst_tune.training.hf_checkpointer import HFCheckpointer

log = utils.get_logger("INFO")


@dataclass(frozen=True)
class BackboneCache:
    """One quantised backbone as a safetensors file.

    Args:
        path (Path): need not exist. Its name says of which files, format and dtype it is, so one
            that is there is the right one; it may be deleted at any time.
    """

    path: Path

    def load(self, model: TransformerDecoder, device: torch.device) -> str | None:
        """Fill the backbone of a model that was built on the meta device.

        Args:
            model (TransformerDecoder): changed in place; a side network is left alone.
            device (torch.device): where the backbone shall live.

        Returns:
            str | None: the checkpoint's fingerprint, as ``load_backbone`` gives it; None, and
                nothing is changed, if there is no file or it is damaged.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt", device=str(device)) as file:
                _check(file, model)
                fingerprint = str(file.metadata()["fingerprint"])
                _fill(file, model, device)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            log.warning(f"{self.path} is damaged ({error}); quantising again")
            return None
        build_rotary_caches(model.layers, device)
        log.info(f"quantised backbone read from {self.path}")
        return fingerprint

    def save(self, model: TransformerDecoder, fingerprint: str) -> None:
        """Write the file, whole or not at all, on the first process; failing is only a warning.

        Args:
            model (TransformerDecoder): loaded.
            fingerprint (str): from ``load_backbone``.
        """
        if rank_and_world_size()[0] != 0:
            return
        parts: dict[str, torch.Tensor] = {}
        for name, tensor in _tensors(model).items():
            parts.update(_parts(name, tensor))
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            plain = {name: part.detach().cpu().contiguous() for name, part in parts.items()}
            save_file(plain, aside, metadata={"format": "pt", "fingerprint": fingerprint})
            aside.replace(self.path)
            log.info(f"quantised backbone kept in {self.path} ({_gigabytes(self.path):.2f} GB)")
        except (SafetensorError, OSError) as error:
            log.warning(f"the quantised backbone cannot be kept in {self.path}: {error}")
        finally:
            aside.unlink(missing_ok=True)


def backbone_cache(
    checkpointer: Any, model: TransformerDecoder, dtype: torch.dtype
) -> BackboneCache | None:
    """Find where a model's quantised backbone is kept.

    Args:
        checkpointer (Any): an ``HFCheckpointer``; any other keeps none.
        model (TransformerDecoder): built, perhaps on meta.
        dtype (torch.dtype): of what is not quantised.

    Returns:
        BackboneCache | None: None if the checkpointer keeps none or nothing is quantised.
    """
    quantization = quantization_of_backbone(model)
    if (
        not isinstance(checkpointer, HFCheckpointer)
        or checkpointer.cache_dir is None
        or quantization == "none"
    ):
        return None
    described = repr((checkpointer.identity, quantization, str(dtype), __version__))
    key = hashlib.sha256(described.encode()).hexdigest()[:16]
    return BackboneCache(checkpointer.cache_dir / f"{checkpointer.name}-{key}.safetensors")


def _tensors(model: TransformerDecoder) -> dict[str, torch.Tensor]:
    """Everything of the backbone that comes from its checkpoint."""
    tensors = {n: p for n, p in model.named_parameters() if not n.startswith(SIDE_PREFIX)}
    for prefix, module in model.named_modules():
        if isinstance(module, PEQALinear):
            buffers = module.named_buffers(recurse=False)
            tensors.update((f"{prefix}.{name}", buffer) for name, buffer in buffers)
    return tensors


def _parts(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain tensors that a tensor consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        return {name: tensor}
    names, _ = tensor.__tensor_flatten__()
    return {f"{name}/{part}": getattr(tensor, part) for part in names}


def _check(file: Any, model: TransformerDecoder) -> None:
    expected: dict[str, list[int]] = {}
    for name, tensor in _tensors(model).items():
        expected.update((key, list(part.shape)) for key, part in _parts(name, tensor).items())
    found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    if found != expected:
        raise ValueError("it holds other tensors than the model")


def _fill(file: Any, model: TransformerDecoder, device: torch.device) -> None:
    for name, tensor in _tensors(model).items():
        # A copy on a CPU: there the source is a view of the memory-mapped file.
        parts = {key: file.get_tensor(key).clone() for key in _parts(name, tensor)}
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        filled = _assembled(tensor, name, parts, device)
        if isinstance(tensor, nn.Parameter):
            filled = nn.Parameter(filled, requires_grad=tensor.requires_grad)
        setattr(owner, leaf, filled)


def _assembled(
    tensor: torch.Tensor, name: str, parts: dict[str, torch.Tensor], device: torch.device
) -> torch.Tensor:
    """A tensor like ``tensor``, which is on meta, of these parts."""
    if isinstance(tensor, QuantizedTable):
        return QuantizedTable(
            parts[f"{name}/codes"], parts[f"{name}/row_scale"], tensor.form, tensor.dtype
        )
    if not isinstance(tensor, NF4Tensor):
        return parts[name]
    names, context = tensor.__tensor_flatten__()
    dtype = parts[f"{name}/nf4"].dtype  # of the levels, and so of what is decoded
    layout = dataclasses.replace(context["tensor_meta"], device=device, dtype=dtype)
    weight: torch.Tensor = NF4Tensor.__tensor_unflatten__(
        {part: parts[f"{name}/{part}"] for part in names},
        {**context, "tensor_meta": layout},
        tensor.shape,
        tensor.stride(),
    )
    return weight


def _gigabytes(path: Path) -> float:
    return path.stat().st_size / 1e9
