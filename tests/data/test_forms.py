"""Forms are known by their columns; a row whose values do not fit is refused by name."""

from typing import Any

import pytest

from qst_tune.data.rows.forms import find_form, read_row
from qst_tune.errors import UserError

TURNS = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (("prompt", "messages", "prompt_id"), "messages"),
        (("prompt", "chosen", "rejected", "messages"), "chosen, rejected"),
        (("instruction", "input", "output", "text"), "instruction, output"),
        (("input", "output", "text"), "input, output"),
        (("prompt", "completion", "text"), "prompt, completion"),
        (("text", "label"), "text"),
        (("prompt", "output"), None),
        ((), None),
    ],
)
def test_richest_form_wins(columns: tuple[str, ...], name: str | None) -> None:
    form = find_form(columns)
    assert (form and form.name) == name


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, "column 'text' is null: it must be text"),
        ({"text": 3}, "column 'text' is a number (3): it must be text"),
        ({"input": "a", "output": None}, "column 'output' is null"),
        ({"input": ["a"], "output": "b"}, "column 'input' is a list (['a']): it must be text"),
        ({"instruction": "a", "input": 1, "output": "b"}, "column 'input' is a number (1)"),
        (
            {"prompt": "a", "completion": 1},
            "column 'completion' is a number (1): it must be text or a",
        ),
        ({"prompt": "a", "completion": []}, "column 'completion' is empty: it must be a list"),
        ({"chosen": "a", "rejected": "b"}, "are text, so it needs a column 'prompt'"),
        ({"chosen": TURNS, "rejected": TURNS[:1]}, "column 'rejected' has no answer"),
        ({"input": "a", "output": "b", "system": 3}, "column 'system' is a number (3)"),
    ],
)
def test_value_that_does_not_fit_is_refused_by_name(row: dict[str, Any], message: str) -> None:
    form = find_form(row)
    assert form is not None
    with pytest.raises(UserError) as error:
        read_row(form, row)
    assert message in str(error.value)


def test_row_without_the_columns_of_the_others_is_refused() -> None:
    form = find_form(("input", "output"))
    assert form is not None
    with pytest.raises(UserError, match="it has no column 'output': its columns are input, answer"):
        read_row(form, {"input": "a", "answer": "b"})
