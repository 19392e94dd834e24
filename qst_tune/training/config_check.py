"""Find the mistakes of a config before anything heavy loads; report all of them at once."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qst_tune.errors import ConfigError, Problem, UserError
from qst_tune.models.hf.folder import read_settings, weight_files
from qst_tune.models.hf.hub import is_hub_name
from qst_tune.training.component_check import component_problems
from qst_tune.training.config_keys import TRAINING_KEYS, Key, Keys, required_keys
from qst_tune.training.config_variables import variables_in
from qst_tune.training.nearest import nearest
from qst_tune.training.other_names import other_name_hint


def check_config(cfg: DictConfig, keys: Keys) -> None:
    """Check the keys of a config, their values, its components and their arguments.

    Args:
        cfg (DictConfig): the merged config.
        keys (Keys): what the recipe reads; keys of a training config are accepted besides.

    Raises:
        UserError: one line for each mistake.
    """
    raise_problems(config_problems(cfg, keys))


def raise_problems(problems: list[Problem]) -> None:
    """Raise if there are any.

    Args:
        problems (list[Problem]): all that were found.

    Raises:
        UserError: with a line for each.
    """
    if problems:
        raise ConfigError(problems)


def config_problems(cfg: DictConfig, keys: Keys) -> list[Problem]:
    """Find mistakes of keys, values, components and their arguments, in the order of the config.

    Keys of a training config are accepted by every recipe.
    """
    known = sorted({*keys, *TRAINING_KEYS})
    # A key of the user's own is fine where another value refers to it, as in ${cache}/runs.
    variables = variables_in(cfg)
    problems = [
        Problem(str(key), f"unknown key {key!r}{other_name_hint(key) or nearest(key, known)}")
        for key in map(str, cfg)
        if key not in known and key not in variables
    ]
    values: Any = OmegaConf.to_container(cfg, resolve=False)
    problems += [
        Problem(key, f"key {key!r} is missing")
        for key in required_keys(keys)
        if values.get(key) is None
    ]
    interpolation = _interpolation_problem(cfg)
    if interpolation:  # without a value behind every reference, values cannot be looked at
        return [*problems, interpolation]
    return [*problems, *component_problems(cfg), *_value_problems(cfg, keys)]


def _value_problems(cfg: DictConfig, keys: Keys) -> Iterator[Problem]:
    """Find values that a key does not take; null is a matter of what is required."""
    for name, key in keys.items():
        value = cfg.get(name)
        if value is not None and not _takes(key, value):
            yield Problem(name, f"{name}={value} must be {_values_of(key)}")


def _takes(key: Key, value: Any) -> bool:
    if key.choices:
        return value in key.choices and not isinstance(value, bool)
    if key.kind in (int, float):
        return _is_number(key, value)
    if key.kind is bool:
        return isinstance(value, bool)
    if key.kind is Path:
        return isinstance(value, str) and bool(value)
    return True  # blocks and lists are looked into where they are used


def _is_number(key: Key, value: Any) -> bool:
    if isinstance(value, bool) or (key.kind is int and not isinstance(value, int)):
        return False
    try:
        number = float(value)
    except (TypeError, ValueError):
        return False
    bounds = {
        "least": key.least is None or number >= key.least,
        "above": key.above is None or number > key.above,
        "most": key.most is None or number <= key.most,
        "below": key.below is None or number < key.below,
    }
    return number == number and all(bounds.values())


def _values_of(key: Key) -> str:
    """What a key takes, as the end of a sentence."""
    if key.choices:
        return one_of(key.choices if key.required else (*key.choices, "null"))
    if key.kind not in (int, float):
        return {bool: "True or False", Path: "a path"}[key.kind]
    bounds = {
        "of at least": key.least,
        "above": key.above,
        "of at most": key.most,
        "below": key.below,
    }
    limits = [f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None]
    noun = "a whole number" if key.kind is int else "a number"
    return " ".join([noun, " and ".join(limits)]).strip()


def one_of(choices: Iterable[Any]) -> str:
    """Name at least two choices as a sentence does: "a, b or c"."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}"


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
