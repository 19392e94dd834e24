"""Build the components of a config; check them against their signatures without calling them."""

import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torchtune import config

from qst_tune.config.keys import NOUNS
from qst_tune.config.other_names import other_name_hint
from qst_tune.errors import Problem, UserError, did_you_mean, first_line
from qst_tune.torchtune_compat import component_of

# Block -> number of positional arguments and names of keyword arguments that a recipe gives.
_GIVEN: dict[str, tuple[int, tuple[str, ...]]] = {
    "dataset": (1, ()),
    "dataset_val": (1, ()),
    "optimizer": (1, ()),
    "lr_scheduler": (1, ("num_training_steps", "last_epoch")),
    "model": (0, ()),
    "tokenizer": (0, ()),
    "checkpointer": (0, ()),
    "loss": (0, ()),
    "metric_logger": (0, ()),
    "profiler": (0, ()),
}
_PLAIN = {int, float, bool, str, type(None)}

# Beginning of the name of a component that is gone -> what to use now.
_GONE = {
    "qst_tune.models.qst_opt": "OPT is qst_tune.models.qst_from_hf with its checkpoint_dir",
    "qst_tune.training.opt_checkpointer": "use qst_tune.training.HFCheckpointer",
    "qst_tune.training.hf_checkpointer": "use qst_tune.training.HFCheckpointer",
    "qst_tune.training.tuned_checkpointer": "use qst_tune.training.TunedCheckpointer",
}


def component_problems(cfg: DictConfig) -> list[Problem]:
    """Find components that do not exist, and arguments that they do not take, lack or misread."""
    shapeless = [problem for block in _GIVEN for problem in _shape_problems(block, cfg.get(block))]
    wrong = [problem for path, node in _nodes(cfg) for problem in _problems(path, node)]
    return [*shapeless, *wrong]


def _shape_problems(path: str, node: object) -> list[Problem]:
    """Find what should be a component and is not even a block of one."""
    if isinstance(node, ListConfig) and path.startswith("dataset"):
        parts = [_shape_problems(f"{path}[{i}]", part) for i, part in enumerate(node)]
        return [problem for part in parts for problem in part]
    if isinstance(node, DictConfig) and "_component_" not in node:
        return [Problem(path, f"{path}: _component_ is missing")]
    if node is not None and not isinstance(node, DictConfig):
        return [Problem(path, f"{path}={node} must be a block with a _component_")]
    return []


def _nodes(node: object, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every block with a ``_component_``, with its dotted path."""
    if isinstance(node, DictConfig):
        if "_component_" in node:
            yield path, node
        for key in map(str, node):
            yield from _nodes(node[key], f"{path}.{key}" if path else key)
    elif isinstance(node, ListConfig):
        for index, item in enumerate(node):
            yield from _nodes(item, f"{path}[{index}]")


def _problems(path: str, node: DictConfig) -> list[Problem]:
    name, key = node["_component_"], f"{path}._component_"
    try:
        component = component_of(str(name))
    except Exception as error:  # importing a user's own module may raise anything
        now = next((f"; {now}" for old, now in _GONE.items() if str(name).startswith(old)), "")
        text = f"{path}: component {name!r} cannot be imported: {_last_line(error)}{now}"
        return [Problem(key, text)]
    if not callable(component):
        return [Problem(key, f"{path}: component {name!r} is not callable")]
    try:
        parameters = inspect.signature(component).parameters
    except (TypeError, ValueError):  # written in C, without a signature
        return []
    return [
        *_unknown_arguments(path, node, parameters),
        *_missing_arguments(path, node, parameters),
        *_wrong_types(path, node, component),
    ]


_Parameters = typing.Mapping[str, inspect.Parameter]


def _unknown_arguments(path: str, node: DictConfig, parameters: _Parameters) -> list[Problem]:
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return []
    return [
        Problem(
            f"{path}.{key}",
            f"{path}: {node['_component_']} takes no argument {key!r}"
            f"{did_you_mean(key, parameters) or other_name_hint(key)}",
        )
        for key in map(str, node)
        if key != "_component_" and key not in parameters
    ]


def _missing_arguments(path: str, node: DictConfig, parameters: _Parameters) -> list[Problem]:
    block = path.split("[")[0]
    if block not in _GIVEN:
        return []
    num_positional, given = _GIVEN[block]
    required = [
        name
        for name, parameter in list(parameters.items())[num_positional:]
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    return [
        Problem(path, f"{path}: {node['_component_']} needs the argument {name!r}")
        for name in required
        if name not in node and name not in given
    ]


def _wrong_types(path: str, node: DictConfig, component: object) -> list[Problem]:
    problems = []
    for key, allowed in _plain_types(component).items():
        # A reference is checked where its value is.
        if key not in node or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if not any(_is_of(value, kind) for kind in allowed):
            nouns = " or ".join(sorted(NOUNS[kind] for kind in allowed if kind in NOUNS))
            problems.append(Problem(f"{path}.{key}", f"{path}.{key}={value} must be {nouns}"))
    return problems


def _plain_types(component: Any) -> dict[str, tuple[type, ...]]:
    """Allowed types of each parameter that is annotated with numbers, bool, text and None alone."""
    try:
        parameters = inspect.signature(component, eval_str=True).parameters
    except Exception:  # annotations may name what is imported for type checkers alone
        return {}
    plain = {}
    for name, parameter in parameters.items():
        hint = parameter.annotation
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = set(typing.get_args(hint) if is_union else (hint,)) - {torch.Tensor}
        if kinds and kinds <= _PLAIN:
            plain[name] = tuple(kinds | ({type(None)} if parameter.default is None else set()))
    return plain


def _is_of(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _last_line(error: Exception) -> str:
    """The informative line: torchtune's InstantiationError wraps the cause in several."""
    cause = error.__cause__ or error
    return str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__


def instantiate(block: DictConfig, name: str, *args: object, **kwargs: object) -> Any:
    """Build a component of the config; UserError with the name of its block if it raises."""
    try:
        return config.instantiate(block, *args, **kwargs)
    except UserError as error:  # of a component of ours
        if re.match(rf"{re.escape(name)}\b", str(error)):
            raise
        raise UserError(f"{name}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {first_line(error)}") from error
    except Exception as error:  # a component may be the user's own code
        # Messages of other types need not be sentences: a KeyError's is the key.
        reason = f"{type(error).__name__}: {first_line(error)}"
        cause = f" ({first_line(error.__cause__)})" if error.__cause__ else ""
        raise UserError(f"{name}: {block._component_} failed: {reason}{cause}") from error
