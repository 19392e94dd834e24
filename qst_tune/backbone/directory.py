"""Which kind of directory it is, which of its files contain the weights, and how to read one."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qst_tune.errors import UserError
from qst_tune.json_files import read_json

_SHARD = re.compile(
    r"(?P<stem>model|pytorch_model)-(?P<number>\d+)-of-(?P<total>\d+)\.(?P<kind>\w+)"
)
# In the order that transformers takes them; a directory may have the same weights in both formats.
FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))


def read_settings(directory: Path) -> dict[str, Any]:
    """Read ``config.json``; UserError, saying what the directory is instead, if it is missing."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} {_what_it_is(directory)}")
    return read_json(path)


def _what_it_is(directory: Path) -> str:
    """The rest of a sentence about a directory without ``config.json``."""
    if not directory.is_dir():
        return "does not exist; download the model there (tune download), or name its directory"
    adapter = directory / "adapter_config.json"
    if adapter.is_file():
        return (
            f"is a PEFT adapter, not a model; name the directory of its base model{_base(adapter)}"
        )
    if (directory / "qst_config.json").is_file():
        return "is the result of a qst_tune run, not a model; name the directory of its base model"
    if any(directory.glob("*.gguf")):
        return "has GGUF files only; name the directory of their original Hugging Face model"
    if (directory / "params.json").is_file():
        return "is in Meta's or Mistral's own format; download the model in Hugging Face's format"
    return "has no config.json; it is not a Hugging Face model, or its download is not complete"


def _base(adapter: Path) -> str:
    try:
        name = read_json(adapter).get("base_model_name_or_path")
    except UserError:
        return ""
    return f", {name}" if name else ""


def weight_files(directory: Path) -> list[Path]:
    """Return the sorted files with the weights, safetensors where a directory has both formats.

    UserError if there are none, or some are missing or cut off.
    """
    for stem, kind in FORMATS:
        whole = f"{stem}.{kind}"
        is_one = (directory / whole).is_file()
        names = {whole} if is_one else _indexed(directory, f"{whole}.index.json")
        names = names or _listed(directory, stem, kind)
        if names:
            _check_present(directory, names)
            paths = [directory / name for name in sorted(names)]
            if kind == "safetensors":
                _check_whole(paths)
            return paths
    gguf = any(directory.glob("*.gguf"))
    reason = "GGUF files only, which cannot be read" if gguf else "no weights"
    raise UserError(
        f"{directory} has {reason}; it needs model.safetensors or pytorch_model.bin, or their "
        "shards"
    )


def file_inside(directory: Path, name: object, source: str) -> Path:
    """Return a file that ``source`` names; UserError if the name leaves the directory.

    A link inside the directory may lead elsewhere, as those of huggingface_hub's cache do: a
    download cannot make one.
    """
    path = Path(name) if isinstance(name, str) and "\0" not in name else Path()
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise UserError(f"{source} names {name!r}, which is no file of {directory}")
    return directory / path


def _indexed(directory: Path, index_name: str) -> set[str]:
    """Names of the shards in an index; none if there is no index."""
    path = directory / index_name
    if not path.is_file():
        return set()
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an index of shards: download it again") from error
    for name in names:
        file_inside(directory, name, str(path))
    return names


def _listed(directory: Path, stem: str, kind: str) -> set[str]:
    """Names of the shards without an index, as many as their names give."""
    for path in directory.glob(f"{stem}-*-of-*.{kind}"):
        match = _SHARD.fullmatch(path.name)
        if match:
            width, total = len(match["number"]), int(match["total"])
            return {f"{stem}-{i:0{width}}-of-{match['total']}.{kind}" for i in range(1, total + 1)}
    return set()


def _check_present(directory: Path, names: set[str]) -> None:
    missing = sorted(name for name in names if not (directory / name).is_file())
    if missing:
        raise UserError(
            f"{directory} lacks {len(missing)} of its {len(names)} weight files, for example "
            f"{missing[0]}: download it again"
        )


def _check_whole(paths: list[Path]) -> None:
    """Compare each file with what its header promises; no weight is read."""
    for path in paths:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or cut off ({error}): download it again") from error


def read_weights_file(path: Path) -> dict[str, torch.Tensor]:
    """Open a file, safetensors or torch's ``.bin``, and return its weights by name.

    They are memory-mapped, except in a ``.bin`` from before torch 1.6. UserError if the file is
    damaged or has more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"  # else from before torch 1.6
        weights: dict[str, torch.Tensor] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=is_zip or None
        )
        return weights
    except Exception as error:  # each format has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged, or has more than weights: {reason}") from error
