"""The outermost layer of a recipe: read the config, and turn a user's mistake into one line."""

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from torchtune import config

from qst_tune.errors import USER_ERROR_STATUS, ConfigError, UserError
from qst_tune.terminal import hide_routine_lines, safe_streams
from qst_tune.training.config_help import help_text
from qst_tune.training.config_keys import TRAINING_KEYS, Keys
from qst_tune.training.config_lines import lines_of
from qst_tune.training.config_overrides import merge_overrides
from qst_tune.training.config_variables import variables_in
from qst_tune.training.progress_bars import hide_bars_of_small_files

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
TRACEBACK_VARIABLE = "QST_TUNE_TRACEBACK"


def run_recipe(
    recipe_main: Callable[[DictConfig], None], keys: Keys = TRAINING_KEYS, doc: str | None = None
) -> None:
    """Run a recipe's main function on ``--config FILE key=value ...`` and exit.

    A :class:`~qst_tune.errors.UserError` is printed without a traceback (``QST_TUNE_TRACEBACK=1``
    shows it), with exit status 2; any other exception is a defect and keeps its own. ``--help``
    prints the recipe's docstring ``doc`` and its keys.
    """
    hide_routine_lines()
    with safe_streams():
        if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
            sys.stdout.write(help_text(Path(sys.argv[0]).stem, doc or "", keys))
            sys.exit(0)
        _run(recipe_main)


def _run(recipe_main: Callable[[DictConfig], None]) -> None:
    try:
        cfg = parse_config(sys.argv[1:])
        hide_bars_of_small_files(cfg)
        recipe_main(cfg)
    except UserError as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        lines = _with_places(error, sys.argv[1:])
        sys.stderr.writelines(f"error: {line}\n" for line in lines)
        sys.exit(USER_ERROR_STATUS)
    except OSError as error:  # while logging, say; checkpoints tell it themselves
        if error.errno not in _DISK_ERRORS or os.environ.get(TRACEBACK_VARIABLE):
            raise
        sys.stderr.write(f"error: {error}: make room, then resume_from_checkpoint=True goes on\n")
        sys.exit(USER_ERROR_STATUS)
    except KeyboardInterrupt:
        sys.exit(130)


def parse_config(arguments: list[str]) -> DictConfig:
    """Merge ``--config FILE`` with ``key=value`` and ``~key``, by torchtune's own rules.

    UserError if the file is missing or not a YAML mapping, or an override is malformed.
    """
    known, overrides = _parser().parse_known_args(arguments)
    for override in overrides:
        if override.startswith(("-", "+")) or ("=" not in override and override[:1] != "~"):
            raise UserError(f"override {override!r} is not of the form key=value or ~key")
    settings = _read_yaml(known.config)
    try:
        merged = merge_overrides(settings, overrides)
    except Exception as error:  # OmegaConf and YAML raise many types for a malformed override
        raise UserError(f"overrides {' '.join(overrides)}: {_first_line(error)}") from error
    _remove_null_blocks(merged)
    _remove_unused_variables(merged, settings)
    _forget_source(merged, settings, overrides)
    return merged


def _forget_source(merged: DictConfig, settings: dict[str, Any], overrides: list[str]) -> None:
    """Drop the file's ``dataset.source`` once overrides name another component.

    It is the example of ``auto_dataset``; ``dataset=torchtune.datasets.samsum_dataset`` has its
    own.
    """
    for name in ("dataset", "dataset_val"):
        before, now = settings.get(name), merged.get(name)
        if not isinstance(before, dict) or not isinstance(now, DictConfig):
            continue
        is_given = any(text.startswith(f"{name}.source=") for text in overrides)
        was_auto = str(before.get("_component_")).endswith(".auto_dataset")
        if was_auto and now.get("_component_") != before["_component_"] and not is_given:
            now.pop("source", None)


def _remove_unused_variables(merged: DictConfig, settings: dict[str, Any]) -> None:
    """Drop what the file names for itself, as in ${cache}/runs, once overrides leave it unused."""
    used_before, used_now = variables_in(OmegaConf.create(settings)), variables_in(merged)
    for name in used_before - used_now - set(TRAINING_KEYS):
        if isinstance(settings.get(name), str):
            merged.pop(name, None)


def instantiate(block: DictConfig, name: str, *args: Any, **kwargs: Any) -> Any:
    """Build a component of the config; UserError with the name of its block if it raises."""
    try:
        return config.instantiate(block, *args, **kwargs)
    except UserError as error:  # of a component of ours
        if re.match(rf"{re.escape(name)}\b", str(error)):
            raise
        raise UserError(f"{name}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {_first_line(error)}") from error
    except Exception as error:  # a component may be the user's own code
        # Messages of other types are not whole sentences: of a KeyError it is the key.
        reason = f"{type(error).__name__}: {_first_line(error)}"
        cause = f" ({_first_line(error.__cause__)})" if error.__cause__ else ""
        raise UserError(f"{name}: {block._component_} failed: {reason}{cause}") from error


def _with_places(error: UserError, arguments: list[str]) -> list[str]:
    """The message's lines; each mistake of the config file with its line there."""
    if not isinstance(error, ConfigError):
        return str(error).splitlines()
    known, overrides = _parser().parse_known_args(arguments)
    places = lines_of(known.config)
    overridden = tuple(text.partition("=")[0] for text in overrides)
    lines = []
    for problem in error.problems:
        is_from_file = not problem.key.startswith(overridden) if overridden else True
        line = places.get(problem.key) if is_from_file else None
        lines.append(f"config: {problem.text}" + (f" ({known.config}:{line})" if line else ""))
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tune run")
    parser.add_argument("--config", required=True, type=Path)
    return parser


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        raise UserError(
            f"config {path} does not exist; `tune ls` lists the built-in ones"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"config {path} is not a mapping of names to values")
    return {str(key): value for key, value in content.items()}


def _remove_null_blocks(cfg: DictConfig) -> None:
    """Let ``dataset_val=null`` mean what it says; torchtune makes it ``_component_: null``."""
    for key in list(cfg):
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and "_component_" in node and node["_component_"] is None:
            cfg[key] = None


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
