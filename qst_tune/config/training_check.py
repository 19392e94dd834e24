"""What must hold between the keys of a training config, and on this machine, before a run."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from qst_tune.backbone.hub import is_hub_name
from qst_tune.config.check import check_checkpoint_dir, config_problems
from qst_tune.config.cli import instantiate
from qst_tune.config.defaults import LOCAL_FORMATS, data_files, dataset_blocks
from qst_tune.config.device import choose_device, choose_dtype
from qst_tune.config.keys import TRAINING_KEYS
from qst_tune.config.schedule_check import learning_rates
from qst_tune.errors import ConfigError, Problem, UserError


def check_training_config(cfg: DictConfig, refused: Mapping[str, str]) -> None:
    """Raise a line for each mistake of a training config.

    ``refused`` has the keys that the method does not support, each with the reason and what to do
    instead.
    """
    problems = config_problems(cfg, TRAINING_KEYS)
    if not problems:  # what follows takes the values for granted
        problems = [
            *_validation_problems(cfg),
            *_packing_problems(cfg),
            *_file_problems(cfg),
            *_sharding_problems(cfg),
            *_fsdp_block_problems(cfg),
            *_trial_problems(cfg),
        ]
    problems += [
        Problem(key, f"{key}={cfg[key]} {why}") for key, why in refused.items() if cfg.get(key)
    ]
    if problems:
        raise ConfigError(problems)


def _validation_problems(cfg: DictConfig) -> Iterator[Problem]:
    if cfg.get("val_fraction") and cfg.get("dataset_val"):
        text = "val_fraction and dataset_val both choose a validation set: remove one of them"
        yield Problem("val_fraction", text)
    key = "early_stopping_patience"
    if not cfg.get(key):
        return
    if not (cfg.get("val_fraction") or cfg.get("dataset_val")):
        yield Problem(key, f"{key} needs a validation set: add dataset_val, or val_fraction=0.05")
    elif not cfg.get("run_val_every_n_steps") and cfg.epochs == 1:
        text = f"{key} needs run_val_every_n_steps or more epochs: only the end would be measured"
        yield Problem(key, text)


def _sharding_problems(cfg: DictConfig) -> Iterator[Problem]:
    key = "backbone_sharding"
    mode = cfg.get(key)
    if mode is not None and cfg.get("compile"):
        yield Problem("compile", f"compile=True does not go with {key}={mode}: set one to null")
    cache = cfg.get("hidden_state_cache")
    if mode is not None and cache is not None:
        text = (
            f"hidden_state_cache={cache} does not go with {key}={mode}: a process that reads its "
            "states would leave the others waiting for its part of the backbone; set one to null"
        )
        yield Problem("hidden_state_cache", text)
    if mode is None and cfg.get("fsdp_cpu_offload"):
        text = f"fsdp_cpu_offload=True offloads the parts of a sharded backbone: set {key}=full"
        yield Problem("fsdp_cpu_offload", text)


def _fsdp_block_problems(cfg: DictConfig) -> Iterator[Problem]:
    """Torchtune's llama2/7B_qlora and 70B_qlora have the block, with cpu_offload: False."""
    block: Any = cfg.get("fsdp") or {}
    for name, value in block.items():
        if name != "cpu_offload" or value:
            text = f"fsdp.{name}={value}: use backbone_sharding=full and fsdp_cpu_offload={value}"
            yield Problem(f"fsdp.{name}", text)


def _packing_problems(cfg: DictConfig) -> Iterator[Problem]:
    for name in ("dataset", "dataset_val"):
        packed = [bool(part.get("packed")) for _, part in dataset_blocks(cfg, name)]
        if any(packed) and not all(packed):
            yield Problem(name, f"{name}: packed must be the same for all datasets of the list")
        elif any(packed) and cfg.tokenizer.get("max_seq_len") is None:
            text = f"{name}: packed=True needs tokenizer.max_seq_len, the length of a pack"
            yield Problem("tokenizer.max_seq_len", text)


def _file_problems(cfg: DictConfig) -> Iterator[Problem]:
    try:
        check_checkpoint_dir(cfg.checkpointer, may_lack_weights=bool(cfg.get("dry_run")))
    except UserError as error:
        yield Problem("checkpointer", str(error).removeprefix("config: "))
    for key in ("path", "merges_file", "vocab_path"):
        value = cfg.tokenizer.get(key)
        if value and not Path(str(value)).exists() and not _is_on_hub(str(value), cfg):
            yield Problem(f"tokenizer.{key}", f"tokenizer: {key}={value} does not exist")
    yield from _cache_problems(cfg.get("hidden_state_cache"))
    for path, block in dataset_blocks(cfg, "dataset", "dataset_val"):
        yield from _dataset_problems(path, block)


def _is_on_hub(path: str, cfg: DictConfig) -> bool:
    """A model's hub name, or a file in the model that the checkpointer names so."""
    name = str(cfg.checkpointer.get("checkpoint_dir"))
    return is_hub_name(path) or (is_hub_name(name) and path.startswith(f"{name}/"))


def _cache_problems(directory: Any) -> Iterator[Problem]:
    if not directory or not isinstance(directory, str):
        return
    path = Path(directory).absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        text = (
            f"hidden_state_cache={directory} cannot be written: {there} is not a writable directory"
        )
        yield Problem("hidden_state_cache", text)


def _dataset_problems(name: str, block: DictConfig) -> Iterator[Problem]:
    if block.get("streaming"):
        text = f"{name}: streaming=True gives rows in one order only; set it to False"
        yield Problem(f"{name}.streaming", text)
    is_local = str(block.get("_component_")).endswith(".auto_dataset")
    is_local = is_local or block.get("source") in LOCAL_FORMATS.values()
    for file in data_files(block) if is_local else []:
        is_plain = not any(mark in file for mark in ("://", *"*?["))
        if is_plain and not Path(file).expanduser().exists():
            yield Problem(f"{name}.data_files", f"{name}: data_files={file} does not exist")


def _trial_problems(cfg: DictConfig) -> Iterator[Problem]:
    """Build, for a single number, what otherwise fails only after the model has loaded."""
    trials: dict[str, Callable[[], Any]] = {
        "device": lambda: choose_dtype(cfg, choose_device(cfg)),
        "loss": lambda: instantiate(cfg.loss, "loss"),
        "optimizer": lambda: _try_optimizer(cfg.optimizer),
        "lr_scheduler": lambda: cfg.get("lr_scheduler") and learning_rates(cfg, 10),
    }
    failed = set()
    for key, trial in trials.items():
        try:
            trial()
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
