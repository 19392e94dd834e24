"""Where a run takes place: device, dtype, process group and output folder."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from omegaconf import DictConfig

from qst_tune.training.distributed import process_group
from qst_tune.training.model_setup import choose_device, choose_dtype
from qst_tune.training.output_folder import output_folder


@contextmanager
def run_environment(cfg: DictConfig) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Choose device and dtype, and hold the output directory and the process group for a run.

    With ``dry_run`` nothing is written, not even the directory. UserError if the device, the dtype
    or the directory cannot be used.
    """
    device = choose_device(cfg)
    dtype = choose_dtype(cfg, device)
    folder = nullcontext() if cfg.get("dry_run") else output_folder(Path(cfg.output_dir))
    with folder, process_group(device):
        yield device, dtype
