"""Typed configs of a few keys, for functions that read no others; the schema of a recipe."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qst_tune.config.keys import ConfigT, RecipeConfig, typed
from qst_tune.config.schema import TrainingConfig


def typed_config(
    config: Mapping[str, Any] | DictConfig, schema: type[ConfigT] = TrainingConfig
) -> ConfigT:
    """Return a config without checking it; required keys that it lacks are None."""
    return typed(OmegaConf.create(config) if isinstance(config, dict) else config, schema)


def schema_of(recipe: ModuleType) -> type[RecipeConfig]:
    """Return the config class of a recipe: the most derived one in its module."""
    classes = [value for value in vars(recipe).values() if isinstance(value, type)]
    return max((c for c in classes if issubclass(c, RecipeConfig)), key=lambda c: len(c.__mro__))
