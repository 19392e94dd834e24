"""Find the mistakes of a config before anything heavy loads; report all of them at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qst_tune.backbone.directory import read_settings, weight_files
from qst_tune.backbone.hub import is_hub_name
from qst_tune.config.components import component_problems
from qst_tune.config.file import variables_in
from qst_tune.config.keys import TRAINING_KEYS, Keys
from qst_tune.config.other_names import other_name_hint
from qst_tune.errors import ConfigError, Problem, UserError, did_you_mean


def check_config(cfg: DictConfig, keys: Keys) -> None:
    """Raise a UserError with a line for each mistake that :func:`config_problems` finds."""
    problems = config_problems(cfg, keys)
    if problems:
        raise ConfigError(problems)


def config_problems(cfg: DictConfig, keys: Keys) -> list[Problem]:
    """Find mistakes of keys, values, components and their arguments, in the order of the config.

    Keys of a training config are accepted by every recipe.
    """
    known = sorted({*keys, *TRAINING_KEYS})
    # A key of the user's own is fine if another value refers to it, as in ${cache}/runs.
    variables = variables_in(cfg)
    problems = [
        Problem(str(key), f"unknown key {key!r}{other_name_hint(key) or did_you_mean(key, known)}")
        for key in map(str, cfg)
        if key not in known and key not in variables
    ]
    values: Any = OmegaConf.to_container(cfg, resolve=False)
    problems += [
        Problem(key, f"key {key!r} is missing")
        for key, rule in keys.items()
        if rule.required and values.get(key) is None
    ]
    interpolation = _interpolation_problem(cfg)
    if interpolation:  # values that refer to nothing cannot be checked
        return [*problems, interpolation]
    return [*problems, *component_problems(cfg), *_value_problems(cfg, keys)]


def _value_problems(cfg: DictConfig, keys: Keys) -> Iterator[Problem]:
    """Find values that a key does not take; null is a matter of what is required."""
    for name, key in keys.items():
        value = cfg.get(name)
        if value is not None and not key.accepts(value):
            yield Problem(name, f"{name}={value} must be {key.values()}")


def _interpolation_problem(cfg: DictConfig) -> Problem | None:
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        return Problem(str(error.full_key or ""), str(error).splitlines()[0])
    return None


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
    if str(checkpointer.get("_component_")).endswith(
        ".HFCheckpointer"
    ):  # which finds the files itself
        read_settings(directory)
        if not may_lack_weights or any(
            [*directory.glob("*.safetensors"), *directory.glob("*.bin")]
        ):
            weight_files(directory)
    files = checkpointer.get("checkpoint_files")
    missing = [
        str(name)
        for name in (files if isinstance(files, ListConfig) else [])
        if not (directory / str(name)).is_file()
    ]
    if missing:
        raise UserError(f"checkpointer.checkpoint_files: {missing[0]} is not in {directory}")
    return directory
