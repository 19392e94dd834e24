"""Find the mistakes of a config before anything heavy loads; report all of them at once."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qst_tune.config.components import component_problems
from qst_tune.config.defaults import fill_in, hide_bars_of_small_files
from qst_tune.config.file import variables_in
from qst_tune.config.keys import LARGEST, ConfigT, Keys, keys_of, typed
from qst_tune.config.other_names import other_name_hint
from qst_tune.config.schema import TRAINING_KEYS, TrainingConfig
from qst_tune.config.training_check import training_problems
from qst_tune.config.trials import (
    Trials,
    check_comparable,
    parse_trials,
    title,
    trial_config,
)
from qst_tune.errors import ConfigError, Problem, did_you_mean, first_line


def read_config(
    raw: DictConfig, schema: type[ConfigT], refused: Mapping[str, str] | None = None
) -> ConfigT:
    """Return the typed config of a recipe; ConfigError with all mistakes.

    What a training config leaves open is filled in, in place. ``refused`` has the keys that the
    method does not support, each with the reason and what to do instead.
    """
    keys = keys_of(schema)
    if unresolved(raw) is None:
        hide_bars_of_small_files(raw)
        if "dataset_val" in keys:
            fill_in(raw)
    problems = config_problems(raw, keys)
    if not problems and issubclass(schema, TrainingConfig):  # it takes the values for granted
        problems = [*training_problems(typed(raw, schema))]
    values: Any = OmegaConf.to_container(raw, resolve=False)
    problems += [
        Problem(key, f"{key}={values[key]} {why}")
        for key, why in (refused or {}).items()
        if values.get(key)
    ]
    if problems:
        raise ConfigError(problems)
    return typed(raw, schema)


def read_trials(cfg: ConfigT, refused: Mapping[str, str] | None = None) -> Trials[ConfigT]:
    """Return the trials of a training config, with the config that each has alone; perhaps none.

    Trial n is the run in ``output_dir/trials/n``. ConfigError with all mistakes, UserError if they
    cannot share batches or not be compared.
    """
    raw = cfg.raw
    if raw.get("trials") is None:
        return Trials()
    if isinstance(cfg, TrainingConfig):
        check_comparable(raw)
    trials = parse_trials(raw.trials)
    found, problems = [], []
    for number, settings in enumerate(trials.settings, start=1):
        try:
            one = trial_config(raw, settings, number)
            found.append(read_config(one, type(cfg), refused))
        except ConfigError as error:
            named = f"trial {number} ({title(settings)})"
            problems += [Problem("trials", f"{named}: {p.text}") for p in error.problems]
    if problems:
        raise ConfigError(problems)
    return replace(trials, configs=tuple(found))


def config_problems(raw: DictConfig, keys: Keys) -> list[Problem]:
    """Find mistakes of keys, values, components and their arguments, in the order of the config.

    Keys of a training config are accepted by every recipe.
    """
    known = sorted({*keys, *TRAINING_KEYS})
    # A key of the user's own is fine if another value refers to it, as in ${cache}/runs.
    variables = variables_in(raw)
    problems = [
        Problem(str(key), f"unknown key {key!r}{other_name_hint(key) or did_you_mean(key, known)}")
        for key in map(str, raw)
        if key not in known and key not in variables
    ]
    values: Any = OmegaConf.to_container(raw, resolve=False)
    problems += [
        Problem(key, f"key {key!r} is missing")
        for key, rule in keys.items()
        if rule.required and values.get(key) is None
    ]
    absent = unresolved(raw)
    if absent is not None:  # values that refer to nothing cannot be checked
        return [*problems, absent]
    return [*problems, *component_problems(raw), *_value_problems(raw, keys)]


def unresolved(raw: DictConfig) -> Problem | None:
    """Find a value that refers to nothing or to itself, as in ``${nowhere}``."""
    try:
        OmegaConf.to_container(raw, resolve=True)
    except OmegaConfBaseException as error:
        key, reason = str(error.full_key or ""), first_line(error)
        return Problem(key, reason if key in reason else f"{key}: {reason}")
    return None


def _value_problems(raw: DictConfig, keys: Keys) -> Iterator[Problem]:
    """Find values that a key does not take; null is a matter of what is required."""
    for name, key in keys.items():
        value = raw.get(name)
        if value is not None and not key.accepts(value):
            is_huge = key.kind is int and isinstance(value, int) and abs(value) > LARGEST
            most = f", at most {LARGEST}" if is_huge else ""
            yield Problem(name, f"{name}={value} must be {key.values()}{most}")
