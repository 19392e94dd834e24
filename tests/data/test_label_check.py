"""Rows without anything to learn are an error, or a warning where there are others."""

from array import array
from typing import Any

import pytest

from qst_tune.data.batches.survey import check_labels
from qst_tune.data.batches.survey import Survey
from qst_tune.errors import UserError


def survey(*labels: int, **settings: Any) -> Survey:
    place = "row 7 of r.jsonl" if 0 in labels else None
    return Survey("dataset", "", labels=array("q", labels), without_labels=place, **settings)


def test_rows_with_labels_are_fine() -> None:
    assert check_labels("dataset", [survey(3, 2)]) == []
    assert check_labels("validation rows", [survey(0, 2), survey(3)], [1, 2]) == []


def test_some_without_are_a_warning_with_count_and_example() -> None:
    (warning,) = check_labels("dataset", [survey(0, 2), survey(0, 9)])
    assert warning.startswith("dataset: 2 of 4 rows have no token to learn, such as row 7 of r.jso")


def test_rows_that_learn_only_the_end_of_an_answer_are_a_warning_unless_it_is_a_class() -> None:
    (warning,) = check_labels("dataset", [survey(1, 5, 1)])
    assert warning.startswith("dataset: 2 of 3 rows have one token to learn, as an empty answer")
    assert check_labels("dataset", [survey(1, 1, first={"tokens": [3, 4], "labels": 2})]) == []


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"limit": 32, "num_cut": 2, "labels_lost": 9}, r"fill tokenizer\.max_seq_len=32"),
        ({"limit": 32}, "the chat template does not mark where answers begin"),
    ],
)
def test_none_with_labels_is_an_error_with_the_cause(settings: dict[str, Any], cause: str) -> None:
    with pytest.raises(UserError, match=rf"^dataset: none of its 2 rows has .*{cause}"):
        check_labels("dataset", [survey(0, 0, **settings)])
    with pytest.raises(UserError, match=r"^validation rows: none of its 1 rows has a token"):
        check_labels("validation rows", [survey(0, 5, **settings)], [0])
