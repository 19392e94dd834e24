"""A config file with the command line's overrides, by torchtune's rules except for text and paths.

Where the file has text, an override is taken as typed: a prompt may hold a colon, a path "=" or a
comma. A path may begin with ``~``, which the shell leaves alone behind "=".
"""

import json
import os
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune.config._utils import _has_component, _remove_key_by_dotpath

# What a user writes to be read, and not to be looked up on a disk.
_TEXTS = ("prompt", "prompts", "system_prompt", "new_system_prompt")
# Those that are one text, also where the file has none: that of a training run has no prompt.
_PROSE = ("prompt", "system_prompt")


def merge_overrides(settings: dict[str, Any], overrides: Iterable[str]) -> DictConfig:
    """Merge a config, which loses the keys of ``~key``, with ``key=value``; nothing is resolved.

    ValueError if a key to remove is not there, or is a component.
    """
    changes = []
    for override in overrides:
        if override.startswith("~"):
            _remove(settings, override[1:].split("=")[0])
        else:
            changes.append(_as_yaml(override, settings))
    merged = OmegaConf.merge(OmegaConf.create(settings), OmegaConf.from_dotlist(changes))
    plain = OmegaConf.to_container(merged, resolve=False)
    expanded: DictConfig = OmegaConf.create(_with_home(plain))
    return expanded


def _remove(settings: dict[str, Any], path: str) -> None:
    if "_component_" in path:
        raise ValueError(f"Removing components from CLI is not supported: ~{path}")
    try:
        _remove_key_by_dotpath(settings, path)
    except (KeyError, TypeError):
        raise ValueError(f"Could not find key {path} in yaml config to remove") from None


def _as_yaml(override: str, settings: dict[str, Any]) -> str:
    """Write an override so that OmegaConf reads what was meant."""
    key, _, value = override.partition("=")
    if key in settings and _has_component(settings[key]):
        key += "._component_"
    current: Any = settings
    for part in key.split("."):
        current = current.get(part) if isinstance(current, dict) else None
    is_null = value in ("null", "None", "")
    # Texts that may begin like an alias, a list or a map of YAML: *.jsonl, [v2].jsonl, {% if %}.
    is_list = value[:1] == "[" and value[-1:] == "]"
    is_text = key.endswith((".data_files", ".chat_template")) and not is_list
    is_text = is_text or isinstance(current, str) or key in _PROSE
    if is_text and not is_null and not value.startswith("${"):
        return f"{key}={json.dumps(value, ensure_ascii=False)}"  # YAML knows no surrogate pairs
    if value == "None":
        return f"{key}=null"
    # As in torchtune: the pattern of a checkpoint's file names, where 0007 is no number.
    return f"{key}={'!!str ' if 'max_filename' in key else ''}{value}"


def _with_home(node: Any) -> Any:
    """Replace ``~`` and ``~user`` at the beginning of every text that can be a path."""
    if isinstance(node, dict):
        return {k: v if k in _TEXTS else _with_home(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_with_home(item) for item in node]
    if isinstance(node, str) and node.startswith("~"):
        return os.path.expanduser(node)
    return node
