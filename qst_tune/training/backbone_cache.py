"""Keep a quantised backbone in a file: the next start reads a quarter of it, and rounds nothing."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torchtune import utils
from torchtune.modules import TransformerDecoder

from qst_tune import __version__
from qst_tune.modules.embedding_quantization import quantization_of_backbone
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.modules.rotary_caches import build_rotary_caches
from qst_tune.quantization.parts import join_parts, named_parts
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
        fingerprint = self._read(_all_parts(model), device, lambda file: _replace(file, model))
        if fingerprint is not None:
            build_rotary_caches(model.layers, device)
        return fingerprint

    def load_parts(self, parts: Mapping[str, torch.Tensor]) -> str | None:
        """Fill tensors that are there already.

        Args:
            parts (Mapping[str, torch.Tensor]): changed in place; other tensors than the file's
                count as damage.

        Returns:
            str | None: as :meth:`load`.
        """

        def copy(file: Any) -> None:
            for key, part in parts.items():
                part.copy_(file.get_tensor(key))

        return self._read(parts, torch.device("cpu"), copy)

    def _read(
        self,
        expected: Mapping[str, torch.Tensor],
        device: torch.device,
        use: Callable[[Any], None],
    ) -> str | None:
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt", device=str(device)) as file:
                _check(file, expected)
                fingerprint = str(file.metadata()["fingerprint"])
                use(file)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            log.warning(f"{self.path} is damaged ({error}); quantising again")
            return None
        log.info(f"quantised backbone read from {self.path}")
        return fingerprint

    def save(self, model: TransformerDecoder, fingerprint: str) -> None:
        """Write the file, whole or not at all, on the first process; failing is only a warning.

        Args:
            model (TransformerDecoder): loaded.
            fingerprint (str): from ``load_backbone``.
        """
        if rank_and_world_size()[0] == 0:
            self.save_parts(_all_parts(model), fingerprint)

    def save_parts(self, parts: Mapping[str, torch.Tensor], fingerprint: str) -> None:
        """Write the file of these tensors, as :meth:`save`, on whichever process calls.

        Args:
            parts (Mapping[str, torch.Tensor]): by name.
            fingerprint (str): from ``load_backbone``.
        """
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
    checkpointer: Any, model: TransformerDecoder, dtype: torch.dtype, *, shard: str = ""
) -> BackboneCache | None:
    """Find where a model's quantised backbone is kept.

    Args:
        checkpointer (Any): an ``HFCheckpointer``; any other keeps none.
        model (TransformerDecoder): built, perhaps on meta.
        dtype (torch.dtype): of what is not quantised.
        shard (str): names the part of the backbone that this process keeps; "" is all of it.

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
    name = f"{checkpointer.name}-{key}{shard and '-' + shard}.safetensors"
    return BackboneCache(checkpointer.cache_dir / name)


def _all_parts(model: TransformerDecoder) -> dict[str, torch.Tensor]:
    """The plain tensors of the whole backbone."""
    parts: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(model).items():
        parts.update(named_parts(name, tensor))
    return parts


def _tensors(model: TransformerDecoder) -> dict[str, torch.Tensor]:
    """Everything of the backbone that comes from its checkpoint."""
    tensors = {n: p for n, p in model.named_parameters() if not n.startswith(SIDE_PREFIX)}
    for prefix, module in model.named_modules():
        if isinstance(module, PEQALinear):
            buffers = module.named_buffers(recurse=False)
            tensors.update((f"{prefix}.{name}", buffer) for name, buffer in buffers)
    return tensors


def _check(file: Any, parts: Mapping[str, torch.Tensor]) -> None:
    expected = {key: list(part.shape) for key, part in parts.items()}
    found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    if found != expected:
        raise ValueError("it holds other tensors than the model")


def _replace(file: Any, model: TransformerDecoder) -> None:
    for name, tensor in _tensors(model).items():
        # A copy on a CPU: there the source is a view of the memory-mapped file.
        parts = {key: file.get_tensor(key).clone() for key in named_parts(name, tensor)}
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if name in parts:
            filled = parts[name]
        else:
            own = {key.rpartition("/")[2]: part for key, part in parts.items()}
            filled = join_parts(own, tensor)
        if isinstance(tensor, nn.Parameter):
            filled = nn.Parameter(filled, requires_grad=tensor.requires_grad)
        setattr(owner, leaf, filled)


def _gigabytes(path: Path) -> float:
    return path.stat().st_size / 1e9
