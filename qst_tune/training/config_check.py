"""Find the mistakes of a config before anything heavy loads; report all of them at once."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qst_tune.errors import ConfigError, Problem, UserError
from qst_tune.models.hf.folder import read_settings, weight_files
from qst_tune.models.hf.hub import is_hub_name
from qst_tune.training.component_check import component_problems
from qst_tune.training.config_variables import variables_in
from qst_tune.training.nearest import nearest


def check_config(cfg: DictConfig, *, known: Iterable[str], required: Iterable[str]) -> None:
    """Check keys, components and their arguments.

    Args:
        cfg (DictConfig): the merged config.
        known (Iterable[str]): every top-level key that the recipe reads.
        required (Iterable[str]): those it cannot do without.

    Raises:
        UserError: one line for each mistake.
    """
    raise_problems(config_problems(cfg, known=known, required=required))


def check_numbers(cfg: DictConfig, limits: Mapping[str, tuple[type, int]]) -> None:
    """Check that settings are numbers, and large enough; null is left to :func:`check_config`.

    Args:
        cfg (DictConfig): the merged config.
        limits (Mapping[str, tuple[type, int]]): ``int`` or ``float``, and the least value, by key.

    Raises:
        UserError: one line for each setting that is not.
    """
    raise_problems(number_problems(cfg, limits))


def raise_problems(problems: list[Problem]) -> None:
    """Raise if there are any.

    Args:
        problems (list[Problem]): all that were found.

    Raises:
        UserError: with a line for each.
    """
    if problems:
        raise ConfigError(problems)


def config_problems(
    cfg: DictConfig, *, known: Iterable[str], required: Iterable[str]
) -> list[Problem]:
    """Find mistakes of keys, components and their arguments.

    Args:
        cfg (DictConfig): the merged config.
        known (Iterable[str]): every top-level key that the recipe reads.
        required (Iterable[str]): those it cannot do without.

    Returns:
        list[Problem]: in the order of the config.
    """
    known = sorted(known)
    # A key of the user's own is fine where another value refers to it, as in ${cache}/runs.
    variables = variables_in(cfg)
    problems = [
        Problem(str(key), f"unknown key {key!r}{nearest(str(key), known)}")
        for key in cfg
        if str(key) not in known and str(key) not in variables
    ]
    values: Any = OmegaConf.to_container(cfg, resolve=False)
    problems += [
        Problem(key, f"key {key!r} is missing") for key in required if values.get(key) is None
    ]
    interpolation = _interpolation_problem(cfg)
    # Without a value behind every reference, arguments cannot be looked at.
    return [*problems, interpolation] if interpolation else [*problems, *component_problems(cfg)]


def number_problems(cfg: DictConfig, limits: Mapping[str, tuple[type, int]]) -> list[Problem]:
    """Find settings that are not numbers, or too small.

    Args:
        cfg (DictConfig): the merged config.
        limits (Mapping[str, tuple[type, int]]): ``int`` or ``float``, and the least value, by key.

    Returns:
        list[Problem]: in the order of ``limits``.
    """
    problems = []
    for key, (kind, least) in limits.items():
        value = cfg.get(key)
        if value is not None and not _is_number(value, kind, least):
            noun = "a whole number" if kind is int else "a number"
            problems.append(Problem(key, f"{key}={value} must be {noun} of at least {least}"))
    return problems


def _is_number(value: Any, kind: type, least: int) -> bool:
    if isinstance(value, bool) or (kind is int and not isinstance(value, int)):
        return False
    try:
        return bool(float(value) >= least)
    except (TypeError, ValueError):
        return False


def _interpolation_problem(cfg: DictConfig) -> Problem | None:
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        return Problem(str(error.full_key or ""), str(error).splitlines()[0])
    return None


def check_checkpoint_dir(checkpointer: DictConfig, *, may_lack_weights: bool = False) -> Path:
    """Check that the checkpoint's folder and files are there.

    Args:
        checkpointer (DictConfig): the ``checkpointer`` block.
        may_lack_weights (bool): accept a model that was downloaded without any of its weights.

    Returns:
        Path: the directory; a hub name, which ``fetch_models`` looks at, as it is.

    Raises:
        UserError: if the block names no folder, or the folder or one of its files is missing, or,
            where the checkpointer finds the files itself, it is no Hugging Face model.
    """
    if not checkpointer.get("checkpoint_dir"):
        raise UserError("config: checkpointer.checkpoint_dir is missing")
    folder = Path(checkpointer.checkpoint_dir)
    if is_hub_name(str(folder)):
        return folder
    if not folder.is_dir():
        raise UserError(
            f"checkpointer.checkpoint_dir={folder} does not exist; download the model there "
            "(tune download) or name the folder where it is"
        )
    if str(checkpointer.get("_component_")).endswith(".HFCheckpointer"):  # it finds its own
        read_settings(folder)
        if not may_lack_weights or any([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            weight_files(folder)
    files = checkpointer.get("checkpoint_files")
    missing = [
        str(name)
        for name in (files if isinstance(files, ListConfig) else [])
        if not (folder / str(name)).is_file()
    ]
    if missing:
        raise UserError(f"checkpointer.checkpoint_files: {missing[0]} is not in {folder}")
    return folder
