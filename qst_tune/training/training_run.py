"""What every training recipe does before its own steps; what can fail cheaply fails first."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from qst_tune.backbone.torchtune_loading import check_architecture
from qst_tune.config.cli import instantiate
from qst_tune.config.defaults import fill_in
from qst_tune.config.device import choose_device, choose_dtype
from qst_tune.config.hub_models import fetch_models
from qst_tune.config.schedule_check import report_schedule
from qst_tune.config.training_check import check_training_config
from qst_tune.data.schedule import schedule_of
from qst_tune.data.survey_report import report_data
from qst_tune.data.training_data import TrainingData
from qst_tune.distributed.processes import process_group, rank_and_world_size
from qst_tune.results.output_directory import output_directory
from qst_tune.results.start import Start, find_start
from qst_tune.training.saved_run import SavedRun, find_saved_run, set_run_date, set_run_seed


@dataclass(frozen=True)
class Run:
    """A run that has begun.

    Args:
        cfg (DictConfig): the merged config, checked and filled in.
        device (torch.device): of this process.
        dtype (torch.dtype): of what is neither quantized nor trainable.
        seed (int): of all random numbers.
        tokenizer (Any): torchtune model tokenizer.
        date (str | None): of the run's first day, where chat templates write it.
        saved (SavedRun | None): what is resumed.
        start (Start | None): the result that the run starts from.
    """

    cfg: DictConfig
    device: torch.device
    dtype: torch.dtype
    seed: int
    tokenizer: Any
    date: str | None
    saved: SavedRun | None
    start: Start | None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints."""
        return rank_and_world_size()[0] == 0

    def report(self, model: Any, data: TrainingData) -> None:
        """Print data and schedule; for a dry run, compare the model with its stored config too."""
        report_data(data, self.tokenizer)
        report_schedule(self.cfg, schedule_of(self.cfg, data.train).num_steps)
        if self.cfg.get("dry_run"):
            check_architecture(model, Path(self.cfg.checkpointer.checkpoint_dir))


@contextmanager
def begin_run(cfg: DictConfig, refused: Mapping[str, str]) -> Iterator[Run]:
    """Check a training config, fetch its model and choose device, seed and what is resumed.

    ``refused`` is for :func:`check_training_config`. UserError for a wrong config, checkpoint or
    directory.
    """
    fill_in(cfg)
    check_training_config(cfg, refused)
    fetch_models(cfg, "tokenizer" if cfg.get("dry_run") else "weights")
    with run_environment(cfg) as (device, dtype):
        saved, start = find_saved_run(cfg), find_start(cfg)
        seed = set_run_seed(cfg, saved)
        tokenizer = instantiate(cfg.tokenizer, "tokenizer")
        date = set_run_date(tokenizer, saved)
        yield Run(cfg, device, dtype, seed, tokenizer, date, saved, start)


@contextmanager
def run_environment(cfg: DictConfig) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Choose device and dtype, and hold the output directory and the process group for a run.

    With ``dry_run`` nothing is written, not even the directory. UserError if the device, the dtype
    or the directory cannot be used.
    """
    device = choose_device(cfg)
    dtype = choose_dtype(cfg, device)
    directory = nullcontext() if cfg.get("dry_run") else output_directory(Path(cfg.output_dir))
    with directory, process_group(device):
        yield device, dtype
