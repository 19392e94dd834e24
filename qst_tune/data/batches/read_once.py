"""Batches that several runs go through side by side: each is read and moved to the device once."""

from collections.abc import Callable, Iterator

from qst_tune.data.batches.loader import Batch, BatchLoader, MapDataset


class ReadOnce:
    """A loader that keeps its last batch, for readers that come to each batch one after another.

    They get the same dictionary, as ``prepare`` makes it of a batch. One that is behind the others
    begins to read anew.
    """

    def __init__(self, loader: BatchLoader, prepare: Callable[[Batch], Batch]) -> None:
        self.loader = loader
        self.prepare = prepare
        self._place: tuple[int, int] | None = None  # of the batch: epoch and number
        self._batch: Batch = {}
        self._rest: Iterator[Batch] | None = None

    @property
    def dataset(self) -> MapDataset:
        """The rows."""
        return self.loader.dataset

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.loader)

    def rows(self, epoch: int = 0) -> list[list[int]]:
        """Return the indices of the rows of each batch of an epoch."""
        return self.loader.rows(epoch)

    def batches(self, epoch: int = 0, *, start: int = 0) -> Iterator[Batch]:
        """Read the batches of an epoch from the batch ``start`` on."""
        for number in range(start, len(self)):
            yield self._read(epoch, number)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def _read(self, epoch: int, number: int) -> Batch:
        if self._place != (epoch, number):
            rest = self._rest if self._place == (epoch, number - 1) else None
            rest = self.loader.batches(epoch, start=number) if rest is None else rest
            self._place = self._rest = None  # if it fails, whoever is next fails alike
            self._batch = self.prepare(next(rest))
            self._place, self._rest = (epoch, number), rest
        return self._batch
