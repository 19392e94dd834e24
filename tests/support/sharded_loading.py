"""Memory that loading takes of each process: the backbone whole, and shared by 2 and by 4.

Makes a Llama of 8 layers, 2048 wide, in bf16 (four files, 0.86 GB) and loads it as NF4 on so many
forked processes. ``RssAnon`` of Linux is sampled every 5 ms: memory that is the process's own, not
the pages of the checkpoint that the system keeps. With its default threshold, glibc keeps most of
what is freed, and all would seem to hold the same. Linux only; takes minutes::

    MALLOC_MMAP_THRESHOLD_=262144 OMP_NUM_THREADS=1 python -m tests.support.sharded_loading
"""

import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torchtune.training import FullModelHFCheckpointer

from qst_tune.backbone.sharded_loading import load_sharded_backbone
from qst_tune.backbone.torchtune_loading import load_backbone
from qst_tune.distributed.processes import rank_and_world_size
from qst_tune.distributed.sharding import backbone_bytes, choose_sharding, group_bytes
from qst_tune.models import qst_llama3_2
from tests.support.checkpoints import random_weights, write_checkpoint
from tests.support.ranks import on_ranks

CPU = torch.device("cpu")
MIB = 2**20
SIZES: dict[str, Any] = {
    "vocab_size": 8000,
    "num_layers": 8,
    "num_heads": 16,
    "num_kv_heads": 16,
    "embed_dim": 2048,
    "intermediate_dim": 5632,
    "max_seq_len": 512,
    "rope_base": 10_000,
    "scale_factor": 1,
}


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return int(line.split()[1]) * 1024


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Bytes above what there was: at most within the block, and at its end."""
    start, done, seen = own_memory(), threading.Event(), {"peak": 0, "end": 0}

    def sample() -> None:
        while not done.wait(0.005):
            seen["peak"] = max(seen["peak"], own_memory() - start)

    thread = threading.Thread(target=sample)
    thread.start()
    yield seen
    seen["end"] = own_memory() - start
    seen["peak"] = max(seen["peak"], seen["end"])
    done.set()
    thread.join()


def build() -> Any:
    with torch.device("meta"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return qst_llama3_2(**SIZES)
        finally:
            torch.set_default_dtype(default)


def load(directory: Path) -> None:
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    out = str(directory / "out")
    checkpointer = FullModelHFCheckpointer(str(directory), files, "LLAMA3_2", output_dir=out)
    model = build()
    rank, size = rank_and_world_size()
    sharding = choose_sharding("full", CPU)
    with watched() as seen:
        if sharding is None:
            load_backbone(model, checkpointer, dtype=torch.bfloat16, device=CPU)
        else:
            twin = build()
            load_sharded_backbone(
                model, twin, checkpointer, sharding, dtype=torch.bfloat16, device=CPU
            )
    if rank == 0:
        share = backbone_bytes(build()) / size / MIB
        say(
            f"{size} processes: share {share:6.1f} MiB, held {seen['end'] / MIB:6.1f} MiB, "
            f"peak {seen['peak'] / MIB:6.1f} MiB"
        )


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="sharded_loading.") as root:
        directory = Path(root)
        weights = {k: v.bfloat16() for k, v in random_weights(SIZES).items()}
        write_checkpoint(directory, weights, sizes=SIZES, num_shards=4)
        dense = sum(w.nbytes for w in weights.values())
        largest = max(w.nbytes for w in weights.values())
        del weights
        groups, _ = group_bytes(build())
        say(
            f"bf16 checkpoint {dense / MIB:.0f} MiB, its largest weight {largest / MIB:.0f} MiB, "
            f"a layer in NF4 {max(groups) / MIB:.0f} MiB"
        )
        for size in (1, 2, 4):
            on_ranks(size, load, directory)


if __name__ == "__main__":
    main()
