"""What a config leaves open is filled in before it is checked, and so is seen in every record."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from qst_tune.config.device import AUTO, DTYPE_NAMES, automatic_device, automatic_dtype
from qst_tune.errors import ConfigError, Problem

# What `datasets` calls the formats of local files, by their endings.
LOCAL_FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
# Read in about a second.
SMALL_BYTES = 100 * 2**20
# Keys of a dataset block that choose its rows: another choice takes none of them over.
_WHERE = ("data_files", "source", "name", "data_dir", "revision")
_WHICH = (*_WHERE, "split")


def fill_in(cfg: DictConfig) -> None:
    """Fill in device, dtype, the format of local files and what ``dataset_val`` leaves open.

    UserError if ``dataset_val`` has neither a component nor samples of its own.
    """
    if cfg.get("device") in (None, AUTO):
        cfg.device = automatic_device()
    if cfg.get("dtype") in (None, AUTO):
        with suppress(RuntimeError):  # such a device is refused later
            cfg.dtype = DTYPE_NAMES[automatic_dtype(torch.device(str(cfg.device).split(":")[0]))]
    _inherit(cfg)
    for _, block in dataset_blocks(cfg, "dataset", "dataset_val"):
        _name_format(block)


def dataset_blocks(cfg: DictConfig, *names: str) -> Iterator[tuple[str, DictConfig]]:
    """Yield every block under some keys, of a list too, with its path as in ``dataset[0]``."""
    for name in names:
        block = cfg.get(name)
        parts = block if isinstance(block, ListConfig) else [block]
        for index, part in enumerate(parts):
            if isinstance(part, DictConfig):
                yield f"{name}[{index}]" if parts is block else name, part


def data_files(block: DictConfig) -> list[str]:
    """Return the files of a dataset block, one or a list; empty without any, or for a mapping."""
    files = block.get("data_files")
    if not files or isinstance(files, DictConfig):
        return []
    return [str(file) for file in files] if isinstance(files, ListConfig) else [str(files)]


def _inherit(cfg: DictConfig) -> None:
    """Give ``dataset_val`` without a ``_component_`` the settings of ``dataset``."""
    train, val = cfg.get("dataset"), cfg.get("dataset_val")
    if not isinstance(train, DictConfig) or not isinstance(val, DictConfig):
        return
    if "_component_" in val:
        return
    if not any(val.get(key) for key in _WHICH):
        text = (
            "dataset_val names no rows, and would have those of dataset: set "
            "dataset_val.data_files, dataset_val.split or val_fraction=0.05"
        )
        raise ConfigError([Problem("dataset_val", text)])
    dropped: tuple[str, ...] = _WHICH if any(val.get(key) for key in _WHERE) else ("split",)
    if val.get("data_files") and train.get("source") in LOCAL_FORMATS.values():
        dropped = tuple(key for key in dropped if key != "source")
    taken: Any = OmegaConf.to_container(train, resolve=False)
    kept = {key: value for key, value in taken.items() if key not in dropped}
    cfg.dataset_val = OmegaConf.merge(kept, val)


def _name_format(block: DictConfig) -> None:
    """Let ``data_files`` go before a ``source`` on the hub, for components of `datasets`.

    `datasets` would look for the files inside the source. Only local files that exist change it.
    """
    component = str(block.get("_component_"))
    files = data_files(block)
    if not files or not component.startswith(("torchtune.datasets.", "qst_tune.data.")):
        return
    if component.endswith(".auto_dataset") or block.get("source") in LOCAL_FORMATS.values():
        return
    paths = list(map(Path, files))
    formats = {LOCAL_FORMATS.get(_ending(path)) for path in paths}
    if len(formats) == 1 and None not in formats and all(path.is_file() for path in paths):
        block.source = formats.pop()


def _ending(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def hide_bars_of_small_files(cfg: DictConfig) -> None:
    """Switch the bars off if everything that the config reads is in small local files."""
    blocks = dataset_blocks(cfg, "dataset", "dataset_val")
    files = [Path(name) for _, block in blocks for name in data_files(block) or [""]]
    is_local = bool(files) and all(file.is_file() for file in files)
    if is_local and sum(file.stat().st_size for file in files) < SMALL_BYTES:
        datasets.disable_progress_bars()
