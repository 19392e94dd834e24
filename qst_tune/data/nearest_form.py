"""Guesses what a user meant whose columns fit no form."""

from collections.abc import Mapping
from typing import Any

from qst_tune.data.forms import FORMS
from qst_tune.errors import UserError

_QUESTIONS = ("question", "query", "instruction", "prompt", "input", "user", "source", "problem")
_ANSWERS = (
    "answer",
    "response",
    "output",
    "completion",
    "assistant",
    "target",
    "reply",
    "solution",
    "answers",
)
_CONTEXTS = ("context", "input", "passage")
_TEXTS = ("text", "content", "document", "body", "article", "sentence", "code")


def no_form(row: Mapping[str, Any]) -> UserError:
    """Return the error for rows without a form: their columns, the forms and the nearest one."""
    known = "; ".join(form.name for form in FORMS)
    found = f"the columns {', '.join(row)}" if row else "no columns"
    guess = nearest(row)
    advice = "rename columns with dataset.column_map.<name>=<column of yours>"
    if guess:
        mapping = " ".join(
            f"dataset.column_map.{name}={column}"
            for name, column in guess.items()
            if name != column
        )
        advice = f"the nearest is {', '.join(guess)}: set {mapping}"
    return UserError(f"the rows have {found}, and no form has these ({known}); {advice}")


def nearest(row: Mapping[str, Any]) -> dict[str, str]:
    """Guess the columns of the first row for a form, from names and then types; may be empty."""
    lists = [name for name, value in row.items() if _is_conversation(value)]
    if lists:
        return {"messages": lists[0]}
    texts = [name for name, value in row.items() if isinstance(value, str)]
    question, answer = _match(texts, _QUESTIONS), _match(texts, _ANSWERS)
    context = _match([name for name in texts if name not in (question, answer)], _CONTEXTS)
    if question and answer and context:
        return {"instruction": question, "input": context, "output": answer}
    if question and answer:
        return {"input": question, "output": answer}
    text = _match(texts, _TEXTS)
    if text or len(texts) == 1:
        return {"text": text or texts[0]}
    if len(texts) == 2:
        return {"input": texts[0], "output": texts[1]}
    return {}


def check_column_map(column_map: Mapping[str, str], columns: list[str]) -> None:
    """Refuse a map with an unknown name or column; the UserError names the wrong entry."""
    names = list(dict.fromkeys(name for form in FORMS for name in form.columns))
    for name, column in column_map.items():
        if name not in names:
            raise UserError(
                f"column_map.{name}={column}: {name!r} is no column of a form; it must be one of "
                f"{', '.join(names)}"
            )
        if column not in columns:
            raise UserError(
                f"column_map.{name}={column}: there is no column {column!r}, only "
                f"{', '.join(columns)}"
            )


def _match(columns: list[str], words: tuple[str, ...]) -> str | None:
    """The column whose name equals, or else contains, the earliest of some words."""
    plain = {column: column.lower() for column in columns}
    for word in words:
        exact = next((column for column, name in plain.items() if name == word), None)
        if exact:
            return exact
    return next((c for word in words for c, name in plain.items() if word in name), None)


def _is_conversation(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    return is_list and bool({"role", "from"} & value[0].keys())
