"""What must hold between the keys of a training config, and on this machine, before a run."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from qst_tune.backbone.hub import is_hub_name
from qst_tune.config.components import instantiate
from qst_tune.config.defaults import LOCAL_FORMATS, data_files, dataset_blocks
from qst_tune.config.device import choose_device, choose_dtype
from qst_tune.config.model_directory import check_checkpoint_dir
from qst_tune.config.schedule_check import learning_rates
from qst_tune.config.schema import TrainingConfig
from qst_tune.errors import Problem, UserError


def training_problems(cfg: TrainingConfig) -> Iterator[Problem]:
    """Find what does not go together, or is not on this machine, in a config of right values."""
    yield from _validation_problems(cfg)
    yield from _packing_problems(cfg)
    yield from _file_problems(cfg)
    yield from _sharding_problems(cfg)
    yield from _fsdp_block_problems(cfg)
    yield from _building_problems(cfg)


def _validation_problems(cfg: TrainingConfig) -> Iterator[Problem]:
    if cfg.val_fraction and cfg.dataset_val:
        text = "val_fraction and dataset_val both choose a validation set: remove one of them"
        yield Problem("val_fraction", text)
    key = "early_stopping_patience"
    if not cfg.early_stopping_patience:
        return
    if not (cfg.val_fraction or cfg.dataset_val):
        yield Problem(key, f"{key} needs a validation set: add dataset_val, or val_fraction=0.05")
    elif not cfg.run_val_every_n_steps and cfg.epochs == 1:
        text = f"{key} needs run_val_every_n_steps or more epochs: only the end would be measured"
        yield Problem(key, text)


def _sharding_problems(cfg: TrainingConfig) -> Iterator[Problem]:
    key = "backbone_sharding"
    mode = cfg.backbone_sharding
    if mode is not None and cfg.compile:
        yield Problem("compile", f"compile=True does not go with {key}={mode}: set one to null")
    cache = cfg.hidden_state_cache
    if mode is not None and cache is not None:
        text = (
            f"hidden_state_cache={cache} does not go with {key}={mode}: a process that reads its "
            "states would leave the others waiting for its part of the backbone; set one to null"
        )
        yield Problem("hidden_state_cache", text)
    if mode is None and cfg.fsdp_cpu_offload:
        text = f"fsdp_cpu_offload=True offloads the parts of a sharded backbone: set {key}=full"
        yield Problem("fsdp_cpu_offload", text)


def _fsdp_block_problems(cfg: TrainingConfig) -> Iterator[Problem]:
    """Torchtune's llama2/7B_qlora and 70B_qlora have the block, with cpu_offload: False."""
    block: Any = cfg.fsdp or {}
    for name, value in block.items():
        if name != "cpu_offload" or value:
            text = f"fsdp.{name}={value}: use backbone_sharding=full and fsdp_cpu_offload={value}"
            yield Problem(f"fsdp.{name}", text)


def _packing_problems(cfg: TrainingConfig) -> Iterator[Problem]:
    for name in ("dataset", "dataset_val"):
        packed = [bool(part.get("packed")) for _, part in dataset_blocks(cfg.raw, name)]
        if any(packed) and not all(packed):
            yield Problem(name, f"{name}: packed must be the same for all datasets of the list")
        elif any(packed) and cfg.tokenizer.get("max_seq_len") is None:
            text = f"{name}: packed=True needs tokenizer.max_seq_len, the length of a pack"
            yield Problem("tokenizer.max_seq_len", text)


def _file_problems(cfg: TrainingConfig) -> Iterator[Problem]:
    try:
        check_checkpoint_dir(cfg.checkpointer, may_lack_weights=bool(cfg.dry_run))
    except UserError as error:
        yield Problem("checkpointer", str(error).removeprefix("config: "))
    for key in ("path", "merges_file", "vocab_path"):
        value = cfg.tokenizer.get(key)
        if value and not os.path.exists(str(value)) and not _is_on_hub(str(value), cfg):
            text = f"tokenizer: {key}={value} does not exist or cannot be read"
            yield Problem(f"tokenizer.{key}", text)
    yield from _cache_problems(cfg.hidden_state_cache)
    yield from _logger_problems(cfg.metric_logger)
    for path, block in dataset_blocks(cfg.raw, "dataset", "dataset_val"):
        yield from _dataset_problems(path, block)


def _is_on_hub(path: str, cfg: TrainingConfig) -> bool:
    """A model's hub name, or a file in the model that the checkpointer names so."""
    name = str(cfg.checkpointer.get("checkpoint_dir"))
    return is_hub_name(path) or (is_hub_name(name) and path.startswith(f"{name}/"))


def _cache_problems(directory: Path | None) -> Iterator[Problem]:
    if directory is None:
        return
    path = directory.absolute()
    # Not Path.exists, which raises what lies below a closed directory.
    there = next(place for place in (path, *path.parents) if os.path.exists(place))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        text = (
            f"hidden_state_cache={directory} cannot be written: {there} is not a writable directory"
        )
        yield Problem("hidden_state_cache", text)


def _logger_problems(block: DictConfig) -> Iterator[Problem]:
    """Torchtune's DiskLogger makes its ``log_dir`` only, and fails with a traceback at the end."""
    place = Path(str(block.get("log_dir")), str(block.get("filename") or "")).parent
    if block.get("filename") and "/" in str(block.filename) and not os.path.exists(place):
        text = f"metric_logger: filename={block.filename}: the directory {place} does not exist"
        yield Problem("metric_logger.filename", text)


def _dataset_problems(name: str, block: DictConfig) -> Iterator[Problem]:
    if block.get("streaming"):
        text = f"{name}: streaming=True gives rows in one order only; set it to False"
        yield Problem(f"{name}.streaming", text)
    is_local = str(block.get("_component_")).endswith(".auto_dataset")
    is_local = is_local or block.get("source") in LOCAL_FORMATS.values()
    for file in data_files(block) if is_local else []:
        is_plain = not any(mark in file for mark in ("://", *"*?["))
        if is_plain and not os.path.exists(os.path.expanduser(file)):
            text = f"{name}: data_files={file} does not exist or cannot be read"
            yield Problem(f"{name}.data_files", text)


def _building_problems(cfg: TrainingConfig) -> Iterator[Problem]:
    """Build, for a single number, what otherwise fails only after the model has loaded."""
    builders: dict[str, Callable[[], Any]] = {
        "device": lambda: choose_dtype(cfg.dtype, choose_device(cfg.device)),
        "loss": lambda: instantiate(cfg.loss, "loss"),
        "optimizer": lambda: _try_optimizer(cfg.optimizer),
        "lr_scheduler": lambda: _try_schedule(cfg),
    }
    failed = set()
    for key, build in builders.items():
        try:
            build()
        except UserError as error:
            if str(error) not in failed:  # the schedule's optimizer fails as the optimizer did
                yield Problem(key, str(error))
            failed.add(str(error))


def _try_optimizer(block: DictConfig) -> None:
    """Refuse one that needs a closure (LBFGS) or sparse gradients (SparseAdam)."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    optimizer = instantiate(block, "optimizer", [parameter])
    if not type(optimizer).__module__.startswith("torch.optim"):
        return  # torchao's compile their first step
    try:
        optimizer.step()
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"optimizer: {block._component_} cannot train this model: {reason}"
        ) from error
    if not parameter.isfinite():
        settings = ", ".join(
            f"{key!s}={value!s}" for key, value in block.items() if key != "_component_"
        )
        raise UserError(f"optimizer: its first step gives {parameter.item()} with {settings}")


def _try_schedule(cfg: TrainingConfig) -> None:
    """Refuse learning rates that are negative or not finite."""
    for step, rate in enumerate(learning_rates(cfg, 10)[1], start=1):
        if not 0 <= rate < math.inf:
            raise UserError(
                f"lr_scheduler: step {step} of 10 has the learning rate {rate}: it must be at "
                "least 0, and finite"
            )
