"""Values of rows and messages, as JSON and Arrow have them."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from qst_tune.errors import UserError

JsonObject = Mapping[str, Any]


def text_of(value: object, where: str) -> str:
    """Return a value that must be text; for any other, a UserError names its column ``where``."""
    if isinstance(value, str):
        return value
    raise UserError(f"{where} is {kind_of(value)}: it must be text")


def kind_of(value: object) -> str:
    """Describe a value of a wrong type: its kind and, if it is short, the value."""
    if value is None:
        return "null"
    if value == [] or value == {} or value == "":
        return "empty"
    kinds = {bool: "a truth value", int: "a number", float: "a number", str: "text"}
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    written = repr(value)
    return f"{kind} ({written})" if len(written) <= 40 else kind


def quoted(value: object) -> str:
    """Write a value of a row into a message, at most its begin."""
    written = repr(value)
    return written if len(written) <= 60 else f"{written[:57]}..."


def names_of(columns: Iterable[str]) -> str:
    """Write the names of a row's columns into a message, at most the first twenty."""
    names = [name if re.fullmatch(r"[\w .-]{1,40}", name) else quoted(name) for name in columns]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def check_unicode(text: str, what: str) -> str:
    """Return a text; half of a surrogate pair, which no tokenizer takes, is a UserError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} has half a character at {error.start}: save or type it as UTF-8"
        ) from error
    return text


def without_nulls(value: object) -> Any:
    """Copy without keys whose value is null: Arrow gives each object the keys of all others."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def from_json(value: object, where: str) -> Any:
    """Parse a value that CSV, or OpenAI's ``arguments``, store as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is text that is not JSON: {error}") from error
