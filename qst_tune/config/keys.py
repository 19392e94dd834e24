"""How a key of a config is declared: one field of a dataclass has all that is known of it.

The annotation gives the type and, as ``Literal``, the choices; :func:`key` gives the default, the
range and the meaning. Checks, ``--help``, the tables in the docs and the typed values are all made
from :func:`keys_of`.
"""

import inspect
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig

LARGEST = 2**53  # of whole numbers: beyond, tensors and floats no longer count by one


@dataclass(frozen=True, kw_only=True)
class Key:
    """One top-level key.

    Args:
        meaning (str): one line of plain text.
        kind (type): ``int``, ``float``, ``bool``, ``str``, ``list``, ``Path``, or ``dict`` for a
            block with a ``_component_``.
        default (Any): without the key.
        required (bool): whether the recipe cannot do without.
        null (bool): whether null is a value of its own; otherwise it stands for the default.
        least (float | None): smallest number allowed.
        above (float | None): numbers must be greater.
        most (float | None): largest number allowed.
        below (float | None): numbers must be smaller.
        choices (tuple[Any, ...]): the only values allowed; empty: any of the kind.
    """

    meaning: str
    kind: type
    default: Any = None
    required: bool = False
    null: bool = True
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Whether a value that is not null is of the kind and within the bounds."""
        if self.choices:
            return value in self.choices and not isinstance(value, bool)
        if self.kind not in (int, float):
            return isinstance(value, _TYPES[self.kind]) and value != ""
        if isinstance(value, bool) or (self.kind is int and not isinstance(value, int)):
            return False
        if self.kind is int and abs(value) > LARGEST:
            return False
        try:
            number = float(value)  # in YAML a number may be quoted
        except (TypeError, ValueError):
            return False
        return number == number and all(holds(number, to) for _, holds, to in self._bounds())

    def typed(self, value: Any) -> Any:
        """Return the value for the program, of one that is null or accepted."""
        if value is None:
            return None if self.null else self.default
        return self.kind(value) if self.kind in (float, Path) else value

    def values(self) -> str:
        """Return what the key accepts, as the end of a sentence."""
        if self.choices:
            *others, last = map(str, self.choices if self.required else (*self.choices, "null"))
            return f"{', '.join(others)} or {last}"
        limits = " and ".join(f"{words} {to:g}" for words, _, to in self._bounds())
        null = "" if self.required or self.default is not None else ", or null"
        return f"{NOUNS[self.kind]} {limits}".strip() + null

    def _bounds(self) -> Iterator[tuple[str, Callable[[float, float], bool], float]]:
        bounds: list[tuple[str, Callable[[float, float], bool], float | None]] = [
            ("of at least", operator.ge, self.least),
            ("above", operator.gt, self.above),
            ("of at most", operator.le, self.most),
            ("below", operator.lt, self.below),
        ]
        yield from ((words, holds, to) for words, holds, to in bounds if to is not None)


NOUNS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    Path: "a path",
    list: "a list",
    dict: "a block",
}
# Of the kinds that are no numbers; blocks and lists are checked where they are used.
_TYPES: dict[type, type] = {bool: bool, str: str, Path: str, list: object, dict: object}
Keys = Mapping[str, Key]


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """The typed config of a recipe; each field of a subclass is a :func:`key`.

    ``raw`` is the config as it was written, for the records of a run.
    """

    raw: DictConfig = field(repr=False)


ConfigT = TypeVar("ConfigT", bound=RecipeConfig)


def key(meaning: str, *, default: object = MISSING, **bounds: float) -> Any:
    """Declare a key; ``bounds`` are ``least``, ``above``, ``most``, ``below``.

    Without a default it is required, or null where its type allows None.
    """
    return field(default=default, metadata={"meaning": meaning, **bounds})


def keys_of(schema: type[RecipeConfig]) -> dict[str, Key]:
    """Return the keys of a config by name, its own before those of its bases."""
    found = {field.name: field for field in fields(schema) if "meaning" in field.metadata}
    hints = get_type_hints(schema)
    names = [name for base in schema.__mro__ for name in inspect.get_annotations(base)]
    return {name: _key(found[name], hints[name]) for name in dict.fromkeys(names) if name in found}


def typed(raw: DictConfig, schema: type[ConfigT]) -> ConfigT:
    """Read a config that was checked; blocks stay the nodes of ``raw``."""
    values = {name: key.typed(raw.get(name, key.default)) for name, key in keys_of(schema).items()}
    return schema(raw=raw, **values)


def _key(declared: Any, hint: Any) -> Key:
    is_union = get_origin(hint) in (Union, types.UnionType)
    kinds = list(get_args(hint)) if is_union else [hint]
    null = type(None) in kinds
    kind = next(kind for kind in kinds if kind is not type(None))
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    required = declared.default is MISSING and not null
    return Key(
        kind=str if choices else _KINDS.get(kind, kind),
        choices=choices,
        required=required,
        null=null or required,
        default=None if declared.default is MISSING else declared.default,
        **declared.metadata,
    )


_KINDS: dict[Any, type] = {DictConfig: dict, ListConfig: list}
