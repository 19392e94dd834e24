"""Progress bars of the package datasets: of use for a download, flicker for a small local file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from omegaconf import DictConfig, ListConfig

# Read in about a second.
SMALL_BYTES = 100 * 2**20


def hide_bars_of_small_files(cfg: DictConfig) -> None:
    """Switch the bars off if everything that the config reads is in small local files."""
    files = [Path(name) for name in _data_files([cfg.get("dataset"), cfg.get("dataset_val")])]
    is_local = bool(files) and all(file.is_file() for file in files)
    if is_local and sum(file.stat().st_size for file in files) < SMALL_BYTES:
        datasets.disable_progress_bars()


def _data_files(blocks: Any) -> Iterator[str]:
    """Files of datasets, in any nesting of lists; an empty name where a dataset names none."""
    for block in blocks:
        if isinstance(block, ListConfig):
            yield from _data_files(block)
        elif isinstance(block, DictConfig):
            names = block.get("data_files")
            yield from map(str, names if isinstance(names, ListConfig) else [names or ""])
