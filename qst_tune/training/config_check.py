"""Find the mistakes of a config before anything heavy loads; report all of them at once."""

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune.config._utils import _get_component_from_path

from qst_tune.errors import UserError


def check_config(cfg: DictConfig, *, known: Iterable[str], required: Iterable[str]) -> None:
    """Check keys, components and their arguments.

    Args:
        cfg (DictConfig): the merged config.
        known (Iterable[str]): every top-level key that the recipe reads.
        required (Iterable[str]): those it cannot do without.

    Raises:
        UserError: one line for each mistake.
    """
    known = sorted(known)
    # A key of the user's own is fine where another value refers to it, as in ${cache}/runs.
    variables = set(re.findall(r"\$\{(\w+)", OmegaConf.to_yaml(cfg)))
    problems = [
        f"unknown key {key!r}{nearest(str(key), known)}"
        for key in cfg
        if str(key) not in known and str(key) not in variables
    ]
    values: Any = OmegaConf.to_container(cfg, resolve=False)
    problems += [f"key {key!r} is missing" for key in required if values.get(key) is None]
    problems += _interpolation_problems(cfg)
    if not problems:
        for path, node in _component_nodes(cfg):
            problems += _component_problems(path, node)
    if problems:
        raise UserError("\n".join(f"config: {problem}" for problem in problems))


def check_numbers(cfg: DictConfig, limits: Mapping[str, tuple[type, int]]) -> None:
    """Check that settings are numbers, and large enough; null is left to :func:`check_config`.

    Args:
        cfg (DictConfig): the merged config.
        limits (Mapping[str, tuple[type, int]]): ``int`` or ``float``, and the least value, by key.

    Raises:
        UserError: one line for each setting that is not.
    """
    problems = []
    for key, (kind, least) in limits.items():
        value = cfg.get(key)
        if value is not None and not _is_number(value, kind, least):
            noun = "a whole number" if kind is int else "a number"
            problems.append(f"config: {key}={value} must be {noun} of at least {least}")
    if problems:
        raise UserError("\n".join(problems))


def _is_number(value: Any, kind: type, least: int) -> bool:
    if isinstance(value, bool) or (kind is int and not isinstance(value, int)):
        return False
    try:
        return bool(float(value) >= least)
    except (TypeError, ValueError):
        return False


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Give the end of an error message that suggests the nearest right name.

    Args:
        name (str): what was written.
        candidates (Iterable[str]): what could have been meant.

    Returns:
        str: "; did you mean 'x'?" or nothing.
    """
    match = difflib.get_close_matches(name, list(candidates), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def _interpolation_problems(cfg: DictConfig) -> list[str]:
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        return [str(error).splitlines()[0]]
    return []


def _component_nodes(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every block with a ``_component_``, with its dotted path."""
    if isinstance(node, DictConfig):
        if "_component_" in node:
            yield path, node
        for key in map(str, node):
            yield from _component_nodes(node[key], f"{path}.{key}" if path else key)
    elif isinstance(node, ListConfig):
        for index, item in enumerate(node):
            yield from _component_nodes(item, f"{path}[{index}]")


def _component_problems(path: str, node: DictConfig) -> list[str]:
    name = node["_component_"]
    try:
        component = _get_component_from_path(str(name))
    except Exception as error:  # importing a user's own module may raise anything
        return [f"{path}: component {name!r} cannot be imported: {_last_line(error)}"]
    if not callable(component):
        return [f"{path}: component {name!r} is not callable"]
    return _argument_problems(path, str(name), component, [str(k) for k in node])


def _argument_problems(path: str, name: str, component: Any, keys: list[str]) -> list[str]:
    try:
        parameters = inspect.signature(component).parameters
    except (TypeError, ValueError):  # written in C, without a signature
        return []
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return []
    return [
        f"{path}: {name} takes no argument {key!r}{nearest(key, parameters)}"
        for key in keys
        if key != "_component_" and key not in parameters
    ]


def _last_line(error: Exception) -> str:
    """The informative line: torchtune's InstantiationError wraps the cause in several."""
    cause = error.__cause__ or error
    return str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__


def check_checkpoint_dir(checkpointer: DictConfig) -> Path:
    """Check that the checkpoint's folder and files are there.

    Args:
        checkpointer (DictConfig): the ``checkpointer`` block.

    Returns:
        Path: the folder.

    Raises:
        UserError: if the block names no folder, or the folder or one of its files is missing.
    """
    if not checkpointer.get("checkpoint_dir"):
        raise UserError("config: checkpointer.checkpoint_dir is missing")
    folder = Path(checkpointer.checkpoint_dir)
    if not folder.is_dir():
        raise UserError(
            f"checkpointer.checkpoint_dir={folder} does not exist; download the model there "
            "(tune download) or name the folder where it is"
        )
    files = checkpointer.get("checkpoint_files")
    missing = [
        str(name)
        for name in (files if isinstance(files, ListConfig) else [])
        if not (folder / str(name)).is_file()
    ]
    if missing:
        raise UserError(f"checkpointer.checkpoint_files: {missing[0]} is not in {folder}")
    return folder
