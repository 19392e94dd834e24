"""Every row is read once, counted, kept, and its content is in the digest."""

from array import array
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from qst_tune.data.batches.checked_rows import CheckedRows
from qst_tune.data.batches.survey import (
    RowStore,
    Survey,
    SurveyedRows,
    check_labels,
    labels_of,
    survey_rows,
)
from qst_tune.errors import UserError

IGNORED = -100


class Tokenizer:
    def __init__(self, max_seq_len: int | None = None) -> None:
        self.max_seq_len = max_seq_len


class Rows:
    """Row i is its number of tokens, of which the first half is masked; None is a bad row."""

    def __init__(self, lengths: list[int | None], tokenizer: Tokenizer) -> None:
        self.lengths, self.tokenizer = lengths, tokenizer
        self.reads: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads[index] += 1
        length = self.lengths[index]
        if length is None:
            raise KeyError("input")
        tokens = list(range(index, index + length))
        labels = [IGNORED] * (length // 2) + tokens[length // 2 :]
        limit = self.tokenizer.max_seq_len
        return {"tokens": tokens[:limit], "labels": labels[:limit]}


def survey(
    lengths: list[int | None], limit: int | None = None, *, skip: bool = False
) -> tuple[SurveyedRows, Survey, Rows]:
    tokenizer = Tokenizer(limit)
    rows = Rows(lengths, tokenizer)
    checked = CheckedRows(rows, name="dataset", source="rows")
    return *survey_rows(checked, tokenizer, skip_bad_rows=skip), rows


def test_rows_are_counted_and_read_once() -> None:
    kept, figures, rows = survey([4, 10, 1])
    assert (figures.num_tokens, figures.longest) == (15, 10)
    assert list(figures.labels) == [2, 5, 0], "the first token of a row is never learnt"
    assert figures.num_labels == 7
    assert figures.without_labels == "row 2 of rows"
    expected = [rows[i] for i in range(3)]
    assert [*kept] == expected
    assert set(rows.reads.values()) == {2}, "once by the survey, once by this test"


def test_cut_rows_and_their_labels_are_counted() -> None:
    _, figures, rows = survey([4, 8, 9, 20], limit=8)
    assert (figures.num_cut, figures.limit) == (2, 8)
    assert figures.labels_lost == (5 - 4) + (10 - 0)
    assert list(figures.labels) == [2, 4, 4, 0]
    assert rows.tokenizer.max_seq_len == 8
    assert rows.reads == {0: 1, 1: 2, 2: 2, 3: 2}, "only rows at the limit are read again"


def test_bad_row_stops_or_is_left_out() -> None:
    with pytest.raises(UserError, match=r"^dataset: row 1 of rows cannot be used: KeyError"):
        survey([4, None, 6])
    kept, figures, _ = survey([4, None, 6, None, None, None], skip=True)
    assert [len(row["tokens"]) for row in kept] == [4, 6]
    assert list(kept.numbers) == [0, 2]
    assert figures.num_dropped == 4
    assert figures.reasons[0].startswith("dataset: row 1 of rows cannot be used: KeyError")
    assert len(figures.reasons) == 3
    with pytest.raises(UserError, match=r"none of its 2 rows can be used; the first: .*row 0"):
        survey([None, None], skip=True)


def test_digest_is_of_all_rows() -> None:
    lengths: list[int | None] = [4] * 40
    digests = {survey([*lengths[:i], 5, *lengths[i + 1 :]])[1].digest for i in range(40)}
    assert len(digests) == 40
    assert survey(lengths)[1].digest == survey(lengths, limit=64)[1].digest


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"tokens": [1, 2, 3], "labels": [1, 2, 3]}, [2]),
        ({"tokens": [1, 2, 3], "labels": torch.tensor([1, IGNORED, 3])}, [1]),
        ({"tokens": [1, 2, 3], "labels": 4}, [1]),
        (
            {
                "chosen_input_ids": [1, 2],
                "chosen_labels": [IGNORED, 2],
                "rejected_input_ids": [1, 2, 3],
                "rejected_labels": [IGNORED] * 3,
            },
            [1, 0],
        ),
    ],
)
def test_labels_of_every_kind_of_row(row: dict[str, Any], expected: list[int]) -> None:
    assert labels_of(row) == expected


def survey_of(*labels: int, **settings: Any) -> Survey:
    place = "row 7 of r.jsonl" if 0 in labels else None
    return Survey("dataset", "", labels=array("q", labels), without_labels=place, **settings)


def test_rows_with_labels_are_fine() -> None:
    assert check_labels("dataset", [survey_of(3, 2)]) == []
    assert check_labels("validation rows", [survey_of(0, 2), survey_of(3)], [1, 2]) == []


def test_some_without_are_a_warning_with_count_and_example() -> None:
    (warning,) = check_labels("dataset", [survey_of(0, 2), survey_of(0, 9)])
    assert warning.startswith("dataset: 2 of 4 rows have no token to learn, such as row 7 of r.jso")


def test_rows_that_learn_only_the_end_of_an_answer_are_a_warning_unless_it_is_a_class() -> None:
    (warning,) = check_labels("dataset", [survey_of(1, 5, 1)])
    assert warning.startswith("dataset: 2 of 3 rows have one token to learn, as an empty answer")
    assert check_labels("dataset", [survey_of(1, 1, first={"tokens": [3, 4], "labels": 2})]) == []


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"limit": 32, "num_cut": 2, "labels_lost": 9}, r"fill tokenizer\.max_seq_len=32"),
        ({"limit": 32}, "the chat template does not mark where answers begin"),
    ],
)
def test_none_with_labels_is_an_error_with_the_cause(settings: dict[str, Any], cause: str) -> None:
    with pytest.raises(UserError, match=rf"^dataset: none of its 2 rows has .*{cause}"):
        check_labels("dataset", [survey_of(0, 0, **settings)])
    with pytest.raises(UserError, match=r"^validation rows: none of its 1 rows has a token"):
        check_labels("validation rows", [survey_of(0, 5, **settings)], [0])


STORED: list[dict[str, Any]] = [
    {"tokens": [1, 2, 3], "labels": [-100, 2, 3]},
    {"tokens": [4], "labels": [4]},
    {"tokens": [5, 6], "labels": [-100, 6]},
]


def test_rows_come_back() -> None:
    store = RowStore()
    for row in STORED:
        store.add(row)
    assert [store.get(i) for i in range(4)] == [*STORED, None]
    assert store.num_bytes == 4 * 12


def test_torchtunes_labels_of_numpy_numbers_become_plain_ones() -> None:
    store = RowStore()
    store.add({"tokens": [1], "labels": list(np.array([-100])), "mask": [True]})
    assert store.get(0) == {"tokens": [1], "labels": [-100], "mask": [True]}


def test_class_and_score_are_kept_as_they_are() -> None:
    store = RowStore()
    store.add({"tokens": [1], "labels": 2.5})
    assert store.get(0) == {"tokens": [1], "labels": 2.5}


@pytest.mark.parametrize(
    "odd",
    [
        {"tokens": torch.tensor([1]), "labels": [1]},
        {"tokens": ["a"], "labels": [1]},
        {"tokens": [2**40], "labels": [1]},
        {"tokens": [1]},
    ],
)
def test_from_an_odd_row_on_nothing_is_kept(odd: dict[str, Any]) -> None:
    store = RowStore()
    for row in (STORED[0], odd, STORED[1]):
        store.add(row)
    assert [store.get(i) for i in range(3)] == [STORED[0], None, None]


def test_memory_is_bounded() -> None:
    store = RowStore(max_bytes=4 * 8)
    for row in STORED:
        store.add(row)
    assert [store.get(i) for i in range(3)] == [*STORED[:2], None]
