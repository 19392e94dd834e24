"""Batches: which rows, in which order, from which process."""

from itertools import chain
from typing import Any

import pytest
import torch

from qst_tune.data.batches.loader import BatchLoader
from qst_tune.errors import UserError

MODULE = BatchLoader.__module__
ROWS = list(range(10))


def collate(rows: list[int]) -> dict[str, torch.Tensor]:
    return {"tokens": torch.tensor(rows)}


def loader_of(rank: int, world_size: int, monkeypatch: pytest.MonkeyPatch, **settings):
    monkeypatch.setattr(f"{MODULE}.rank_and_world_size", lambda: (rank, world_size))
    return BatchLoader(ROWS, collate, **{"batch_size": 2, "seed": None, **settings})


def rows_of(loader: BatchLoader, epoch: int = 0, start: int = 0) -> list[list[int]]:
    read = [batch["tokens"].tolist() for batch in loader.batches(epoch, start=start)]
    assert read == loader.rows(epoch)[start:]
    return read


def flat(nested: list[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(nested))


def test_order_is_that_of_the_file_or_of_seed_and_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flat(rows_of(loader_of(0, 1, monkeypatch))) == ROWS
    shuffled = [rows_of(loader_of(0, 1, monkeypatch, seed=seed)) for seed in (0, 0, 1)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert sorted(flat(shuffled[0])) == ROWS
    assert rows_of(loader_of(0, 1, monkeypatch, seed=0), epoch=1) != shuffled[0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_order_is_that_of_torch(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(world_size):
        sampler = torch.utils.data.DistributedSampler(
            ROWS, num_replicas=world_size, rank=rank, shuffle=True, seed=3, drop_last=True
        )
        sampler.set_epoch(5)
        expected = list(torch.utils.data.BatchSampler(sampler, 2, drop_last=True))
        assert rows_of(loader_of(rank, world_size, monkeypatch, seed=3), epoch=5) == expected


@pytest.mark.parametrize("start", range(6))
def test_any_batch_can_be_started_from(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loader_of(0, 1, monkeypatch, seed=1)
    assert rows_of(loader, 2, start) == rows_of(loader, 2)[start:]


def test_worker_processes_do_not_change_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = rows_of(loader_of(0, 1, monkeypatch, seed=1))
    assert rows_of(loader_of(0, 1, monkeypatch, seed=1, num_workers=2)) == alone


def test_processes_share_the_rows_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [rows_of(loader_of(rank, 2, monkeypatch)) for rank in range(2)]
    assert shares == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


class BadRows(list):
    def __getitem__(self, index: Any) -> Any:
        raise UserError("row 3 cannot be used: UserError: it says so")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_of_a_worker_is_reported_as_one_of_this_process(num_workers: int) -> None:
    loader = BatchLoader(BadRows(ROWS), collate, batch_size=2, seed=None, num_workers=num_workers)
    with pytest.raises(UserError, match=r"^row 3 cannot be used: UserError: it says so$"):
        next(loader.batches())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 16])
def test_validation_rows_come_exactly_once(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders = [
        loader_of(rank, world_size, monkeypatch, drop_last=False) for rank in range(world_size)
    ]
    shares = []
    for rank, loader in enumerate(loaders):
        monkeypatch.setattr(f"{MODULE}.rank_and_world_size", lambda r=rank: (r, world_size))
        shares.append(rows_of(loader))
        assert len(loader) == len(shares[-1])
    assert sorted(flat(flat(shares))) == ROWS


@pytest.mark.parametrize("world_size", [1, 2])
def test_same_batches_come_again_in_another_order(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(world_size):
        settings = {"seed": 3, "same_batches": True}
        again = loader_of(rank, world_size, monkeypatch, **settings)
        anew = loader_of(rank, world_size, monkeypatch, seed=3)
        assert rows_of(again) == rows_of(anew)
        orders = [rows_of(again, epoch) for epoch in range(6)]
        assert all(sorted(order) == sorted(orders[0]) for order in orders)
        assert len({str(order) for order in orders}) > 1
        assert rows_of(again, 5) == orders[5]
        assert rows_of(anew, 1) != orders[1]


def test_same_batches_in_the_order_of_the_file_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loader_of(0, 1, monkeypatch, same_batches=True)
    assert flat(rows_of(loader, 2)) == ROWS
