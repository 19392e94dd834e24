"""A cache of a frozen backbone's states: epochs after the first run what trains alone."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torchtune import utils

from qst_tune import __version__
from qst_tune.atomic_files import whole_file
from qst_tune.errors import first_line
from qst_tune.file_lock import locked
from qst_tune.modules.backbone import Visit
from qst_tune.torchtune_compat import Mask

# Left free on the disk: the checkpoints of the run need room too.
RESERVED_BYTES = 2 * 1024**3

log = utils.get_logger("INFO")


class HiddenStateCache:
    """Hidden states of the batches that a backbone has run on, a safetensors file for each batch.

    No gradient enters the frozen layers of QST and nothing in them trains, so they compute the same
    of a batch in every epoch; with this cache they run on each batch once. What is read is bit for
    bit what was computed: a batch is found by its content, and each state has a digest. What is
    damaged is computed anew, and nothing more is written when the disk is full; both are logged.
    Not in the paper. With ``lora_layers`` it keeps what the layers below those compute; LoRA in all
    layers cannot have it, since what they compute changes with every step.

    ``directory`` is for one backbone and one choice of layers. Several processes and runs may share
    it, and its files may be deleted at any time.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.is_full = False
        self.is_tidy = False
        self.reported: set[str] = set()

    def run(
        self,
        compute: Callable[..., torch.Tensor],
        embed: Callable[[], torch.Tensor],
        tokens: torch.Tensor,
        *,
        taps: Sequence[int],
        visit: Visit,
        **where: Mask | None,
    ) -> torch.Tensor:
        """Do what ``compute(taps=, visit=)`` does, on a batch not seen yet or that was damaged.

        ``compute`` is a pass of frozen layers, which depends on ``tokens`` and ``where`` alone. The
        embedding, tap 0, is cheaper computed by ``embed`` than read.
        """
        path = self.directory / f"{_digest_of_batch(tokens, **where)}.safetensors"
        first = int(0 in taps)
        num_kept = len(taps) - first + 1  # the last one is what the pass returns
        num_shown = 0
        try:
            for number, state in enumerate(_read(path, num_kept, tokens.device), start=1):
                if first and not num_shown:
                    visit(embed())
                    num_shown = 1
                if number == num_kept:
                    return state
                visit(state)
                num_shown += 1
        except _DamagedError as error:
            self._report(f"hidden states are computed anew: {error}")
        on_host: list[torch.Tensor] = []
        numbers = itertools.count()

        def show(h_BTD: torch.Tensor) -> None:
            number = next(numbers)
            if number >= first and not self.is_full:
                on_host.append(h_BTD.detach().cpu().contiguous())
            if number >= num_shown:
                visit(h_BTD)

        last_BTD = compute(taps=taps, visit=show)
        if not self.is_full:
            # A clone: a side block may also read the state below LoRA, and safetensors refuses one
            # memory under two names.
            self._write([*on_host, last_BTD.cpu().clone().contiguous()], path)
        return last_BTD

    def _report(self, message: str) -> None:
        """Log once; thousands of files may be of an older version."""
        if message not in self.reported:
            self.reported.add(message)
            log.warning(message)

    def _write(self, states: list[torch.Tensor], path: Path) -> None:
        """Write states to a file that is whole or absent, whenever the process dies."""
        try:
            with locked(self.directory, wait=True) as is_held:
                if is_held and not self.is_tidy:
                    self.is_tidy = True
                    for left in self.directory.glob(".*.safetensors.*"):  # by a killed process
                        left.unlink(missing_ok=True)
                room = shutil.disk_usage(self.directory).free - RESERVED_BYTES
                if sum(state.nbytes for state in states) > room:
                    raise OSError(f"the disk has less than {RESERVED_BYTES / 1024**3:.0f} GiB left")
                about = {**_origin(path), "digests": [_digest(state) for state in states]}
                with whole_file(path, flush=False) as aside:
                    tensors = {str(i): state for i, state in enumerate(states)}
                    save_file(tensors, aside, {"qst_tune": json.dumps(about)})
        except (OSError, SafetensorError) as error:
            self.is_full = True
            self._report(f"no more hidden states are written to {self.directory}: {error}")


class _DamagedError(Exception):
    """A file of the cache is not what was written for its batch; the message names it."""


def _read(path: Path, count: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield the states of a file in order, each after its digest was checked; none without it."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("qst_tune", "{}"))
            for key, expected in _origin(path).items():
                if about.get(key) != expected:
                    raise _DamagedError(
                        f"{path.parent} has files of {about.get(key)}, not {expected}"
                    )
            if len(about["digests"]) != count or len(file.keys()) != count:
                raise ValueError(f"it does not have {count} states")
            for number, digest in enumerate(about["digests"]):
                state = file.get_tensor(str(number))
                if _digest(state) != digest:
                    raise ValueError(f"state {number} does not have its digest")
                yield state.to(device)
    except FileNotFoundError:
        return
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _DamagedError(f"{path} is damaged: {first_line(error)}") from error


def _origin(path: Path) -> dict[str, str]:
    """Name what a file is of: the directory is a backbone's, the file a batch's."""
    versions = f"qst_tune {__version__} with torch {torch.__version__}"
    return {"by": versions, "of": f"{path.parent.name}/{path.name}"}


def _digest(state: torch.Tensor) -> str:
    """Digest of dtype, shape and bits; against damage, not against an attacker."""
    digest = xxhash.xxh3_128(repr((state.dtype, state.shape)).encode())
    digest.update(state.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_of_batch(
    tokens: torch.Tensor, *, mask: Mask | None = None, input_pos: torch.Tensor | None = None
) -> str:
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
