"""The checkpointer of ``*_from_hf`` models, and its cache of the quantised backbone."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torchtune import utils

from qst_tune import __version__
from qst_tune.atomic_files import whole_file
from qst_tune.backbone.directory import weight_files
from qst_tune.backbone.hub import model_name
from qst_tune.backbone.identity import Fingerprint, tensors_digest
from qst_tune.backbone.loading import directory_format
from qst_tune.backbone.torchtune_loading import stored_as
from qst_tune.distributed.processes import is_main_process
from qst_tune.errors import UserError
from qst_tune.file_lock import locked
from qst_tune.modules.plain_parts import Place, join_parts, named_parts
from qst_tune.modules.qst_model import is_side


class HFCheckpointer:
    """A checkpointer that names the directory, which transformers reads.

    In a config::

        checkpointer:
          _component_: qst_tune.training.HFCheckpointer
          checkpoint_dir: ${checkpoint_dir}

    The recipe keeps the quantised backbone in ``cache_dir`` for its next start; None keeps nothing.
    UserError if weight files are missing or cut off, or a quantised directory has a cache.
    """

    def __init__(self, checkpoint_dir: str, cache_dir: str | None = None) -> None:
        directory = Path(checkpoint_dir)
        self.name = model_name(directory)[0].replace("/", "--")
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._checkpoint_dir = directory  # torchtune's name
        self._config = (directory / "config.json").read_bytes()
        self.files = weight_files(directory)
        if cache_dir is not None and directory_format(directory) is not None:
            raise UserError(
                f"checkpointer.cache_dir={cache_dir}: {directory} is quantised already, so there "
                "is nothing to keep; set it to null"
            )

    @property
    def identity(self) -> str:
        """Identifies the state of the directory, without reading the weights."""
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        return hashlib.sha256(self._config + repr(files).encode()).hexdigest()

    def load_checkpoint(self) -> None:
        """Refuse, always with a UserError: torchtune's names are those of its own checkpointers."""
        raise UserError(
            "checkpointer: HFCheckpointer is for *_from_hf; with a builder over torchtune, such as "
            "qst_llama2_7b, use torchtune.training.FullModelHFCheckpointer"
        )


log = utils.get_logger("INFO")

Parts = Mapping[str, torch.Tensor]  # the plain tensors of a backbone, by name

# Raised when a quantised tensor's bytes change their meaning, so that older files are not read.
_FORMAT = 3  # 1 had 8-bit codes without a sign, 2 no digest


@dataclass(frozen=True)
class BackboneCache:
    """One quantised backbone as a safetensors file.

    The name of ``path`` identifies files, format and dtype, so an existing one is the right one; it
    may be deleted at any time.
    """

    path: Path

    def load(self, model: Any, device: torch.device) -> Fingerprint | None:
        """Fill the backbone of a model that was built on meta; a side network stays as it is.

        Returns the checkpoint's fingerprint, as ``load_backbone`` does; None, and nothing is
        changed, if there is no file, or a bit of it is not as it was written.
        """
        if not self.path.is_file():
            return None
        try:
            parts, fingerprint = self.read(_all_parts(model))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            log.warning(f"{self.path} is damaged ({error}); quantising again")
            return None
        _replace(parts, model, device)
        log.info(f"quantised backbone read from {self.path}")
        return fingerprint

    def read(self, wanted: Parts) -> tuple[Parts, Fingerprint]:
        """Read tensors as they were written, with the shapes of ``wanted``; ValueError if not."""
        with safe_open(self.path, framework="pt") as file:
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = file.metadata()
        shapes = [{name: part.shape for name, part in each.items()} for each in (parts, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError("it has other tensors than the model")
        fingerprint = Fingerprint(facts["fingerprint"], facts["sampled"])
        if facts["digest"] != _digest(parts, fingerprint):
            raise ValueError("its content is not what was written")
        return parts, fingerprint

    def save(self, model: Any, fingerprint: Fingerprint) -> None:
        """Write the file, whole or not at all, on the first process; failing is only a warning."""
        if not is_main_process():
            return
        parts = {n: part.detach().cpu().contiguous() for n, part in _all_parts(model).items()}
        full, sampled = fingerprint
        facts = {"fingerprint": full, "sampled": sampled, "digest": _digest(parts, fingerprint)}
        try:
            with locked(self.path.parent, wait=False) as is_held:
                if not is_held:
                    raise OSError("another process writes there, or it has no file locks")
                with whole_file(self.path, flush=False) as aside:
                    save_file(parts, aside, metadata={"format": "pt", **facts})
            log.info(f"quantised backbone kept in {self.path} ({_gigabytes(self.path):.2f} GB)")
        except (SafetensorError, OSError) as error:
            log.warning(f"the quantised backbone cannot be kept in {self.path}: {error}")


def _digest(parts: Parts, fingerprint: Fingerprint) -> str:
    """Hash all of a file that matters."""
    return hashlib.sha256("".join([tensors_digest(parts), *fingerprint]).encode()).hexdigest()


def backbone_cache(checkpointer: Any, model: Any, dtype: torch.dtype) -> BackboneCache | None:
    """Find where a model's quantised backbone is kept, by an ``HFCheckpointer`` only.

    None if the checkpointer keeps none or nothing is quantised.
    """
    quantization = stored_as(model)
    if (
        not isinstance(checkpointer, HFCheckpointer)
        or checkpointer.cache_dir is None
        or quantization == "none"
    ):
        return None
    described = repr((_FORMAT, checkpointer.identity, quantization, str(dtype), __version__))
    key = hashlib.sha256(described.encode()).hexdigest()[:16]
    name = f"{checkpointer.name}-{key}.safetensors"
    return BackboneCache(checkpointer.cache_dir / name)


def _all_parts(model: Any) -> dict[str, torch.Tensor]:
    """The plain tensors of the whole backbone."""
    parts: dict[str, torch.Tensor] = {}
    for name, (tensor, _) in _tensors(model).items():
        parts.update(named_parts(name, tensor))
    return parts


def _tensors(model: nn.Module) -> dict[str, tuple[torch.Tensor, list[Place]]]:
    """Everything of the backbone that loading fills, and where it is: a tied head's in two places.

    That is also what transformers' models make of their config while they load, such as the
    frequencies of a rotary embedding.
    """
    found: dict[int, tuple[str, torch.Tensor, list[Place]]] = {}
    for path, module in model.named_modules():
        if is_side(path):
            continue
        for name, tensor in {**module._parameters, **module._buffers, **vars(module)}.items():
            if isinstance(tensor, torch.Tensor):
                places = found.setdefault(id(tensor), (f"{path}.{name}", tensor, []))[2]
                places.append(Place(module, name))
    return {name: (tensor, places) for name, tensor, places in found.values()}


def _replace(found: Parts, model: Any, device: torch.device) -> None:
    for name, (tensor, places) in _tensors(model).items():
        # A copy on a CPU: there the source is a view of the memory-mapped file.
        parts = {key: found[key].to(device, copy=True) for key in named_parts(name, tensor)}
        if name in parts:
            filled = parts[name]
        else:
            own = {key.rpartition("/")[2]: part for key, part in parts.items()}
            filled = join_parts(own, tensor)
        if isinstance(tensor, nn.Parameter):
            filled = nn.Parameter(filled, requires_grad=tensor.requires_grad)
        for place in places:
            setattr(place.owner, place.name, filled)


def _gigabytes(path: Path) -> float:
    return path.stat().st_size / 1e9
