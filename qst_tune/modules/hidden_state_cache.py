"""A cache of a frozen backbone's states: epochs after the first run the side network alone."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torchtune import utils

from qst_tune.atomic_files import whole_file
from qst_tune.torchtune_compat import Mask

# Left free on the disk: the checkpoints of the run need room too.
RESERVED_BYTES = 2 * 1024**3

log = utils.get_logger("INFO")


class HiddenStateCache:
    """Hidden states of the batches that a backbone has run on, a safetensors file for each batch.

    No gradient enters the backbone of QST and nothing in it trains, so it computes the same of a
    batch in every epoch; with this cache it runs on each batch once. What is read is bit for bit
    what was computed. A batch is found by its content: another batch, or one whose file is damaged,
    is computed. When the disk is full, no more is written, which is logged once.

    Not in the paper. LoRA cannot do this: what its layers compute changes with every step.

    Args:
        directory (Path): for one backbone and one choice of layers; made when needed. Several
            processes and runs may share it, and its files may be deleted at any time.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.is_full = False

    def read(
        self, tokens: torch.Tensor, *, mask: Mask | None, input_pos: torch.Tensor | None
    ) -> Iterator[torch.Tensor] | None:
        """Find the states of a batch, in order and one at a time, on the device of ``tokens``.

        None if they must be computed. ``tokens`` are ``[B, T]``.
        """
        file = _open(self._path(tokens, mask, input_pos), tokens.device)
        return None if file is None else _tensors_of(file)

    def recorder(
        self, tokens: torch.Tensor, *, mask: Mask | None, input_pos: torch.Tensor | None
    ) -> "Recorder":
        """Begin to record a batch: add each state in order, then write."""
        return Recorder(self, self._path(tokens, mask, input_pos))

    def _path(
        self, tokens: torch.Tensor, mask: Mask | None, input_pos: torch.Tensor | None
    ) -> Path:
        return self.directory / f"{_digest(tokens, mask, input_pos)}.safetensors"

    def keep(self, states: list[torch.Tensor], path: Path) -> None:
        """Write states on the CPU to a file that is whole or absent, whenever the process dies."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            room = shutil.disk_usage(self.directory).free - RESERVED_BYTES
            if sum(state.nbytes for state in states) > room:
                raise OSError(f"the disk has less than {RESERVED_BYTES / 1024**3:.0f} GiB left")
            with whole_file(path, flush=False) as aside:
                save_file({str(i): state for i, state in enumerate(states)}, aside)
        except (OSError, SafetensorError) as error:
            self.is_full = True
            log.warning(f"no more hidden states are written to {self.directory}: {error}")


class Recorder:
    """The states of one batch, copied to the host as they are computed."""

    def __init__(self, cache: HiddenStateCache, path: Path) -> None:
        self._cache, self._path = cache, path
        self._states: list[torch.Tensor] = []

    def add(self, state: torch.Tensor) -> None:
        """Copy the next state, ``[B, T, D]``, unless the disk is full."""
        if not self._cache.is_full:
            self._states.append(state.detach().cpu().contiguous())

    def write(self) -> None:
        """Write the batch's file; the last state must have been added."""
        if self._states:
            self._cache.keep(self._states, self._path)


def _tensors_of(file: Any) -> Iterator[torch.Tensor]:
    with file:
        yield from (file.get_tensor(str(i)) for i in range(len(file.keys())))


def _open(path: Path, device: torch.device) -> Any | None:
    """A file that can be read, or None."""
    try:
        return safe_open(path, "pt", device=str(device))
    except (OSError, SafetensorError):  # there is none, or it is damaged
        return None


def _digest(tokens: torch.Tensor, mask: Mask | None, input_pos: torch.Tensor | None) -> str:
    """Name a batch by all that its hidden states depend on.

    A BlockMask, the mask of a packed batch, has no content to hash; but the positions begin anew
    with each sample, so they identify it.
    """
    digest = hashlib.sha256()
    for part in (tokens, mask, input_pos):
        if isinstance(part, torch.Tensor):
            digest.update(repr((part.dtype, part.shape)).encode())
            digest.update(part.cpu().contiguous().numpy().tobytes())
        else:
            digest.update(type(part).__name__.encode())
    return digest.hexdigest()[:32]
