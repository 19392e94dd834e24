"""A config: a YAML file with the command line's overrides, by torchtune's rules except for text.

Where the file has text, an override is taken as typed: a prompt may contain a colon, a path "=" or
a comma. A path may begin with ``~``, which the shell leaves alone behind "=".
"""

import argparse
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qst_tune.config.schema import TRAINING_KEYS
from qst_tune.errors import UserError, first_line
from qst_tune.torchtune_compat import has_component, remove_key

PlainConfig: TypeAlias = dict[str, Any]  # texts, numbers, lists and dicts, as in YAML

# Texts for the model, in which a leading ~ is no home directory.
_TEXTS = ("prompt", "prompts", "system_prompt", "new_system_prompt")
# Always one text, even if the file has no such key: a training config has no prompt.
_PROSE = ("prompt", "system_prompt")


def split_arguments(arguments: list[str]) -> tuple[Path, list[str]]:
    """Split a recipe's arguments into the config file and the overrides."""
    parser = argparse.ArgumentParser(prog="tune run")
    parser.add_argument("--config", required=True, type=Path)
    known, overrides = parser.parse_known_args(arguments)
    return known.config, overrides


def parse_config(arguments: list[str]) -> DictConfig:
    """Merge ``--config FILE`` with ``key=value`` and ``~key``.

    UserError if the file is missing or not a YAML mapping, or an override is malformed.
    """
    path, overrides = split_arguments(arguments)
    for override in overrides:
        if override.startswith(("-", "+")) or ("=" not in override and override[:1] != "~"):
            raise UserError(f"override {override!r} is not of the form key=value or ~key")
    settings = _read_yaml(path)
    try:
        merged = _merge(settings, overrides)
    except Exception as error:  # OmegaConf and YAML raise many types for a malformed override
        raise UserError(f"overrides {' '.join(overrides)}: {first_line(error)}") from error
    _remove_unused_variables(merged, settings)
    _forget_source(merged, settings, overrides)
    return merged


def variables_in(cfg: object) -> set[str]:
    """Return the top-level keys that values refer to, as in ``${cache}/runs``; cfg is unresolved.

    A resolver such as ``oc.env`` counts as ``oc``.
    """
    return set(re.findall(r"\$\{(\w+)", OmegaConf.to_yaml(cfg)))


def lines_of(path: Path) -> dict[str, int]:
    """Return the line of each key of a YAML file, counted from 1, as in ``dataset[0].packed``.

    Empty if the file cannot be parsed.
    """
    lines: dict[str, int] = {}
    try:
        root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    except (OSError, RecursionError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    _collect(root, "", lines)
    return lines


def _read_yaml(path: Path) -> PlainConfig:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        raise UserError(
            f"config {path} does not exist; `tune ls` lists the built-in ones"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config {path} cannot be read: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise UserError(f"config {path} cannot be read: it is nested too deep") from None
    except OmegaConfBaseException as error:  # of a key that is null, a list or a mapping
        reason = first_line(error)
        raise UserError(f"config {path} is not a mapping of names to values: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"config {path} is not a mapping of names to values")
    return {str(key): value for key, value in content.items()}


def _merge(settings: PlainConfig, overrides: Iterable[str]) -> DictConfig:
    """Merge a config, which loses the keys of ``~key``, with ``key=value``; resolves nothing."""
    changes = []
    for override in overrides:
        if override.startswith("~"):
            _remove(settings, override[1:].split("=")[0])
        else:
            changes.append(_as_yaml(override, settings))
    merged = OmegaConf.merge(OmegaConf.create(settings), OmegaConf.from_dotlist(changes))
    expanded: DictConfig = OmegaConf.create(_with_home(OmegaConf.to_container(merged)))
    return expanded


def _remove(settings: PlainConfig, path: str) -> None:
    if "_component_" in path:
        raise ValueError(f"Removing components from CLI is not supported: ~{path}")
    try:
        remove_key(settings, path)
    except (KeyError, TypeError):
        raise ValueError(f"Could not find key {path} in yaml config to remove") from None


def _as_yaml(override: str, settings: PlainConfig) -> str:
    """Write an override for ``OmegaConf.from_dotlist``, which reads its value as YAML.

    Alone that makes a mapping of "prompt=in short: why?" and null of "prompt=# 1", and fails at
    "data_files=*.jsonl" and "chat_template={% if x %}". So what is text is quoted here.
    """
    key, _, value = override.partition("=")
    if value in ("null", "None", ""):
        return f"{key}=null"
    if key in settings and has_component(settings[key]):
        key += "._component_"
    current: Any = settings
    for part in key.split("."):
        current = current.get(part) if isinstance(current, dict) else None
    # Texts that may begin like an alias, a list or a map of YAML: *.jsonl, [v2].jsonl, {% if %}.
    is_list = value[:1] == "[" and value[-1:] == "]"
    is_text = key.endswith((".data_files", ".chat_template")) and not is_list
    is_text = is_text or isinstance(current, str) or key in _PROSE
    if is_text and not value.startswith("${"):
        return f"{key}={json.dumps(value, ensure_ascii=False)}"  # YAML knows no surrogate pairs
    # As in torchtune: the pattern of a checkpoint's file names, where 0007 is no number.
    return f"{key}={'!!str ' if 'max_filename' in key else ''}{value}"


def _with_home(node: object) -> Any:
    """Replace ``~`` and ``~user`` at the beginning of every text that can be a path."""
    if isinstance(node, dict):
        return {k: v if k in _TEXTS else _with_home(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_with_home(item) for item in node]
    if isinstance(node, str) and node.startswith("~"):
        return os.path.expanduser(node)
    return node


def _remove_unused_variables(merged: DictConfig, settings: PlainConfig) -> None:
    """Drop what the file names for itself, as in ${cache}/runs, once overrides leave it unused."""
    used_before, used_now = variables_in(OmegaConf.create(settings)), variables_in(merged)
    for name in used_before - used_now - set(TRAINING_KEYS):
        if isinstance(settings.get(name), str):
            merged.pop(name, None)


def _forget_source(merged: DictConfig, settings: PlainConfig, overrides: list[str]) -> None:
    """Drop the file's ``dataset.source`` once overrides name another component.

    It is the example of ``auto_dataset``; ``dataset=torchtune.datasets.samsum_dataset`` has its
    own.
    """
    for name in ("dataset", "dataset_val"):
        if OmegaConf.is_interpolation(merged, name):
            continue
        before, now = settings.get(name), merged.get(name)
        if not isinstance(before, dict) or not isinstance(now, DictConfig):
            continue
        is_given = any(text.startswith(f"{name}.source=") for text in overrides)
        was_auto = str(before.get("_component_")).endswith(".auto_dataset")
        if was_auto and now.get("_component_") != before["_component_"] and not is_given:
            now.pop("source", None)


def _collect(node: yaml.Node | None, path: str, lines: dict[str, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = f"{path}.{key.value}" if path else str(key.value)
            lines[child] = key.start_mark.line + 1
            _collect(value, child, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[f"{path}[{index}]"] = item.start_mark.line + 1
            _collect(item, f"{path}[{index}]", lines)
