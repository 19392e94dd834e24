"""Columns that fit no form are listed, with the map that would do it."""

from typing import Any

import pytest

from qst_tune.data.rows.forms import find_form
from qst_tune.data.rows.forms import nearest, no_form

TURNS = [{"role": "user", "content": "x"}]


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
        ({"dialogue": TURNS, "topic": "a"}, {"messages": "dialogue"}),
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
