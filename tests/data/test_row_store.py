"""Rows in memory are those that were read; what does not fit is read again."""

from typing import Any

import numpy as np
import pytest
import torch

from qst_tune.data.batches.survey import RowStore

ROWS: list[dict[str, Any]] = [
    {"tokens": [1, 2, 3], "labels": [-100, 2, 3]},
    {"tokens": [4], "labels": [4]},
    {"tokens": [5, 6], "labels": [-100, 6]},
]


def test_rows_come_back() -> None:
    store = RowStore()
    for row in ROWS:
        store.add(row)
    assert [store.get(i) for i in range(4)] == [*ROWS, None]
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
    for row in (ROWS[0], odd, ROWS[1]):
        store.add(row)
    assert [store.get(i) for i in range(3)] == [ROWS[0], None, None]


def test_memory_is_bounded() -> None:
    store = RowStore(max_bytes=4 * 8)
    for row in ROWS:
        store.add(row)
    assert [store.get(i) for i in range(3)] == [*ROWS[:2], None]
