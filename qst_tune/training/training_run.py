"""What every training recipe does, in this order: what can fail cheaply fails first."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from qst_tune.training.architecture_check import check_architecture
from qst_tune.training.cli import instantiate
from qst_tune.training.config_defaults import fill_in
from qst_tune.training.distributed import rank_and_world_size
from qst_tune.training.hub_models import fetch_models
from qst_tune.training.method import Method, Task
from qst_tune.training.run_environment import run_environment
from qst_tune.training.saved_run import find_saved_run, set_run_date, set_run_seed
from qst_tune.training.schedule_check import report_schedule
from qst_tune.training.start import find_start
from qst_tune.training.survey_report import report_data
from qst_tune.training.trainer_setup import TrainingData, build_trainer, schedule_of
from qst_tune.training.training_config_check import check_training_config, refused_keys


def run_training(
    cfg: DictConfig,
    *,
    build_model: Callable[[DictConfig, torch.dtype], Any],
    build_task: Callable[..., tuple[Task, TrainingData]],
    load_method: Callable[..., Method],
    describe: Callable[[Any, TrainingData, torch.device, torch.dtype], None],
    refused: Mapping[str, str],
) -> None:
    """Train, or with ``dry_run`` say what would be done.

    Args:
        cfg (DictConfig): the merged config.
        build_model (Callable[[DictConfig, torch.dtype], Any]): on the meta device.
        build_task (Callable[..., tuple[Task, TrainingData]]): from config, tokenizer and model,
            with ``seed`` and ``device``.
        load_method (Callable[..., Method]): from model and config, with ``dtype`` and ``device``.
        describe (Callable[[Any, TrainingData, torch.device, torch.dtype], None]): tells of the run
            of a model that would begin now; called on the main process.
        refused (Mapping[str, str]): keys that the method does not have, each with what it says of
            it and what to do instead.

    Raises:
        UserError: for a wrong config, checkpoint or dataset.
    """
    fill_in(cfg)
    check_training_config(cfg, refused_keys(cfg, refused))
    fetch_models(cfg, "tokenizer" if cfg.get("dry_run") else "weights")
    with run_environment(cfg) as (device, dtype):
        saved = find_saved_run(cfg)
        start = find_start(cfg)
        seed = set_run_seed(cfg, saved)
        model = build_model(cfg, dtype)
        tokenizer = instantiate(cfg.tokenizer, "tokenizer")
        date = set_run_date(tokenizer, saved)
        task, data = build_task(cfg, tokenizer, model, seed=seed, device=device)
        report_data(data, tokenizer)
        report_schedule(cfg, schedule_of(cfg, data.train).num_steps)
        if cfg.get("dry_run"):
            check_architecture(model, Path(cfg.checkpointer.checkpoint_dir))
            if rank_and_world_size()[0] == 0:
                describe(model, data, device, dtype)
            return
        method = load_method(model, cfg, dtype=dtype, device=device)
        build_trainer(cfg, method, task, data, device, saved, date=date, start=start).fit()
