"""The directory of a config's model: checked, and fetched if it is a hub name."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.utils.tqdm import disable_progress_bars
from omegaconf import DictConfig, ListConfig, OmegaConf

from qst_tune.backbone.directory import file_inside, read_settings, weight_files
from qst_tune.backbone.hub import Parts, fetch_model, hub_name, is_hub_name
from qst_tune.config.keys import ConfigT, typed
from qst_tune.errors import UserError
from qst_tune.torchtune_compat import file_names

# Only here does a text with one slash mean a model.
_PLACES = ("checkpoint_dir", "model", "tokenizer", "checkpointer")
_NAMED_BY = ("checkpoint_dir", "path")


def check_checkpoint_dir(checkpointer: DictConfig, *, may_lack_weights: bool = False) -> Path:
    """Return the checkpoint's directory, a hub name as it is; UserError if a file is missing.

    ``may_lack_weights`` accepts a model that was downloaded without any of its weights.
    """
    if not checkpointer.get("checkpoint_dir"):
        raise UserError("config: checkpointer.checkpoint_dir is missing")
    directory = Path(checkpointer.checkpoint_dir)
    if is_hub_name(str(directory)):
        return directory
    if not directory.is_dir():
        raise UserError(
            f"checkpointer.checkpoint_dir={directory} does not exist; download the model there "
            "(tune download) or name its directory"
        )
    finds_its_files = str(checkpointer.get("_component_")).endswith(".HFCheckpointer")
    if finds_its_files:
        read_settings(directory)
        has_weights = any([*directory.glob("*.safetensors"), *directory.glob("*.bin")])
        if has_weights or not may_lack_weights:
            weight_files(directory)
    key = "checkpointer.checkpoint_files"
    for name in _listed_files(checkpointer):
        if not file_inside(directory, name, key).is_file():
            raise UserError(f"{key}: {name} is not in {directory}")
    return directory


def _listed_files(checkpointer: Mapping[Any, Any]) -> list[str]:
    """The files that a checkpointer of torchtune is told to read."""
    files = checkpointer.get("checkpoint_files")
    if not isinstance(files, DictConfig):
        return list(files) if isinstance(files, ListConfig) else []
    try:
        return list(file_names(dict(files)))
    except ValueError:
        return []


def fetch_models(cfg: ConfigT, parts: Parts = "weights") -> ConfigT:
    """Download what a config names by a hub name; returns the config that names the directory.

    A directory of that name on this machine goes first. UserError if a model cannot be downloaded.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":  # one process of a machine shows the progress
        disable_progress_bars()
    for name in sorted(set(_hub_names(cfg.raw))):
        directory = fetch_model(name, parts, files=_files_of(cfg.raw, name))
        _replace(cfg.raw, name, str(directory))
    return typed(cfg.raw, type(cfg))


def _hub_names(cfg: DictConfig) -> Iterator[str]:
    for place in _PLACES:
        block = cfg.get(place)
        named = [block.get(key) for key in _NAMED_BY] if isinstance(block, DictConfig) else [block]
        yield from (name for name in named if isinstance(name, str) and is_hub_name(name))


def _files_of(cfg: DictConfig, name: str) -> list[str]:
    """Files that the config names one by one: torchtune's checkpointers do not find their own."""
    block = cfg.get("checkpointer") or {}
    files = _listed_files(block)
    if block.get("checkpoint_dir") != name or not files:
        return []
    path = str(cfg.get("tokenizer", {}).get("path"))  # Llama 3's is original/tokenizer.model
    inside = [path.removeprefix(f"{name}/")] if path.startswith(f"{name}/") else []
    return [*map(str, files), *inside]


def _replace(cfg: DictConfig, name: str, directory: str) -> None:
    def moved(text: str) -> str:
        is_of_it = text == name or text.startswith(f"{name}/")
        return directory + text.removeprefix(name) if is_of_it else text

    plain: Any = OmegaConf.to_container(cfg)
    for place in cfg.keys() & set(_PLACES):
        cfg[place] = changed_texts(plain[place], moved)


def changed_texts(node: object, change: Callable[[str], str]) -> Any:
    """Copy plain dicts, lists and values with each text changed."""
    if isinstance(node, dict):
        return {key: changed_texts(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [changed_texts(value, change) for value in node]
    return change(node) if isinstance(node, str) else node


def with_hub_names(node: object) -> Any:
    """Undo :func:`fetch_models` in a copy of a plain config that is written for others.

    It has ``org/name@commit`` in place of directories of huggingface_hub's cache.
    """
    return changed_texts(node, lambda text: hub_name(text) or text)
