"""Readers that come to each batch one after another get the same one, read once."""

from itertools import zip_longest

import pytest
import torch

from qst_tune.data.batches.loader import Batch, BatchLoader
from qst_tune.data.batches.read_once import ReadOnce
from qst_tune.errors import UserError


class Rows:
    """Ten rows, which count how often they are read; one may be bad."""

    def __init__(self, bad: int | None = None) -> None:
        self.reads, self.bad = [0] * 10, bad

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        self.reads[index] += 1
        if index == self.bad:
            raise UserError(f"row {index} is bad")
        return index


def collate(rows: list[int]) -> Batch:
    return {"tokens": torch.tensor(rows)}


def readers(rows: Rows, **settings: object) -> ReadOnce:
    loader = BatchLoader(rows, collate, **{"batch_size": 2, "seed": 0, **settings})
    return ReadOnce(loader, lambda batch: {**batch, "prepared": torch.ones(1)})


def test_three_readers_side_by_side_read_each_row_once() -> None:
    rows = Rows()
    loader = readers(rows)
    expected = [
        batch["tokens"].tolist() for batch in BatchLoader(Rows(), collate, batch_size=2, seed=0)
    ]
    for number, same in enumerate(zip_longest(*(loader.batches() for _ in range(3)))):
        assert same[0] is same[1] is same[2]
        assert same[0]["tokens"].tolist() == expected[number]
        assert "prepared" in same[0]
    assert rows.reads == [1] * 10
    assert (len(loader), loader.rows(1)) == (5, loader.loader.rows(1))


def test_one_that_is_behind_gets_its_own_batches() -> None:
    loader = readers(Rows())
    ahead = [batch["tokens"].tolist() for batch in loader.batches(1)]
    behind = [batch["tokens"].tolist() for batch in loader.batches(1, start=2)]
    assert behind == ahead[2:] == loader.rows(1)[2:]


def test_each_reader_hears_of_a_row_that_cannot_be_used() -> None:
    loader = readers(Rows(bad=3), seed=None)
    each = [loader.batches() for _ in range(2)]
    assert next(each[0]) is next(each[1])
    for batches in each:
        with pytest.raises(UserError, match="row 3 is bad"):
            next(batches)
