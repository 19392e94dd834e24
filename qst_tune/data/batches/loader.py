"""Which rows make which batch: arithmetic on the seed, so that any step can be found again."""

import signal
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from qst_tune.distributed.processes import rank_and_world_size
from qst_tune.errors import UserError

# The name in a worker's traceback, which torch raises again in this process.
_WORKER_ERROR = f"{UserError.__module__}.{UserError.__qualname__}"

Batch = dict[str, torch.Tensor]
Collate = Callable[[list[Any]], Batch]


class MapDataset(Protocol):
    """Rows by number, as lists and torch's map-style datasets have them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class BatchLoader:
    """Batches of this process's share of a map-style dataset.

    The rows of batch ``index`` of an epoch are a function of the seed, the epoch, the index and the
    number of processes alone: nothing has to be saved to resume in the middle of an epoch, and
    worker processes cannot change the order.

    ``seed`` gives each epoch an order of its own; None keeps the dataset's. ``batch_size`` counts
    the rows of one process. ``drop_last`` deals equally many whole batches to each process and
    leaves out the rest; else each row is dealt exactly once. ``num_workers=0`` reads rows in this
    process. ``same_batches`` repeats the first epoch's batches in every other, in a new order.
    """

    def __init__(
        self,
        dataset: MapDataset,
        collate: Collate,
        *,
        batch_size: int,
        seed: int | None,
        drop_last: bool = True,
        num_workers: int = 0,
        same_batches: bool = False,
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.same_batches = same_batches

    def __len__(self) -> int:
        """Batches an epoch."""
        rank, world_size = rank_and_world_size()
        num_rows = len(self.dataset)
        if self.drop_last:
            return num_rows // world_size // self.batch_size
        return -(-len(range(rank, num_rows, world_size)) // self.batch_size)

    def rows(self, epoch: int = 0) -> list[list[int]]:
        """Return the indices of the rows of each batch of an epoch, which counts from 0."""
        order = self._order(len(self.dataset), 0 if self.same_batches else epoch)
        rank, world_size = rank_and_world_size()
        share = order[rank::world_size].split(self.batch_size)
        batches = [batch.tolist() for batch in share[: len(self)]]
        if self.same_batches and epoch > 0:
            batches = [batches[i] for i in self._order(len(batches), epoch)]
        return batches

    def _order(self, number: int, epoch: int) -> torch.Tensor:
        if self.seed is None:
            return torch.arange(number)
        # As torch's DistributedSampler does, whose order torchtune's recipes use.
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(number, generator=generator)

    def batches(self, epoch: int = 0, *, start: int = 0) -> Iterator[Batch]:
        """Read the batches of an epoch from the batch ``start`` on, on the CPU."""
        dataset: Any = self.dataset  # torch asks for its own class, and takes any of this kind
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self.rows(epoch)[start:],
            collate_fn=self.collate,
            num_workers=self.num_workers,
            worker_init_fn=_ignore_interrupts,
            # Otherwise the loader draws the workers' seed from the global generator.
            generator=torch.Generator().manual_seed(epoch),
        )
        return _readable(loader)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()


def _readable(loader: DataLoader[Any]) -> Iterator[Batch]:
    """The loader's batches; a worker's error comes without the traceback that torch adds."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).rpartition(f"{_WORKER_ERROR}: ")[2].strip()) from error


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches workers too, but the main process still wants their rows for its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
