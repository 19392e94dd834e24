"""Progress bars of the package datasets: of use for a download, flicker for a small local file."""

from pathlib import Path

import datasets
from omegaconf import DictConfig

from qst_tune.config.defaults import data_files, dataset_blocks

# Read in about a second.
SMALL_BYTES = 100 * 2**20


def hide_bars_of_small_files(cfg: DictConfig) -> None:
    """Switch the bars off if everything that the config reads is in small local files."""
    blocks = dataset_blocks(cfg, "dataset", "dataset_val")
    files = [Path(name) for _, block in blocks for name in data_files(block) or [""]]
    is_local = bool(files) and all(file.is_file() for file in files)
    if is_local and sum(file.stat().st_size for file in files) < SMALL_BYTES:
        datasets.disable_progress_bars()
