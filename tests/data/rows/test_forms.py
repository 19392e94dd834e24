"""Forms are known by their columns; a row whose values do not fit is refused by name."""

from typing import Any

import pytest

from qst_tune.data.rows.forms import find_form, nearest, no_form, read_row
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


QUESTION = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "a", "answer": "b"}, {"input": "question", "output": "answer"}),
        (
            {"id": 3, "Question": "a", "best_answer": "b"},
            {"input": "Question", "output": "best_answer"},
        ),
        (
            {"instruction": "a", "context": "b", "response": "c", "category": "d"},
            {"instruction": "instruction", "input": "context", "output": "response"},
        ),
        ({"dialogue": QUESTION, "topic": "a"}, {"messages": "dialogue"}),
        ({"content": "a", "url": "b"}, {"text": "content"}),
        ({"sentence1": "a", "n": 1}, {"text": "sentence1"}),
        ({"de": "a", "en": "b"}, {"input": "de", "output": "en"}),
        ({"a": 1, "b": [2]}, {}),
    ],
)
def test_nearest_form_is_one_that_the_map_makes_fit(
    row: dict[str, Any], expected: dict[str, str]
) -> None:
    assert find_form(row) is None
    assert nearest(row) == expected
    mapped = {name for name in expected} or {"text"}
    assert find_form(mapped, mapped) is not None


def test_message_has_columns_forms_and_the_overrides() -> None:
    message = str(no_form({"question": "a", "answer": "b"}))
    assert message.startswith("the rows have the columns question, answer, and no form has these (")
    wanted = "set dataset.column_map.input=question dataset.column_map.output=answer"
    assert message.endswith(f"the nearest is input, output: {wanted}")
    assert "dataset.column_map.<name>=<column of yours>" in str(no_form({"a": 1}))
