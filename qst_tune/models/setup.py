"""From a config to a model on its device: the steps that training and generation share."""

import time
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig
from torchtune import training, utils
from torchtune.modules import TransformerDecoder

from qst_tune.backbone.hf_checkpointer import backbone_cache
from qst_tune.backbone.hub import model_name
from qst_tune.backbone.identity import BackboneId
from qst_tune.backbone.sharding import (
    choose_sharding,
    load_sharded_backbone,
    load_sharded_directory,
)
from qst_tune.backbone.sizes import check_fits
from qst_tune.backbone.torchtune_loading import (
    check_architecture,
    fingerprint_backbone,
    load_backbone,
    stored_as,
)
from qst_tune.backbone.transformers import transformers_backbone
from qst_tune.backbone.transformers_models import PEQATransformer
from qst_tune.config.check import check_checkpoint_dir
from qst_tune.config.cli import instantiate
from qst_tune.distributed.processes import rank_and_world_size
from qst_tune.errors import UserError
from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.modules.qst_model import QSTModel

ModelT = TypeVar("ModelT", QSTModel, PEQAModel)

log = utils.get_logger("INFO")


def build_on_meta(cfg: DictConfig, dtype: torch.dtype) -> QSTModel:
    """Build the config's QST model on meta; UserError if its ``model`` block builds another."""
    return _expect(QSTModel, "QST", build_any_on_meta(cfg, dtype), cfg)


def build_peqa_on_meta(cfg: DictConfig, dtype: torch.dtype) -> PEQAModel:
    """Build the config's PEQA model on meta; UserError if its ``model`` block builds another."""
    return _expect(PEQAModel, "PEQA", build_any_on_meta(cfg, dtype), cfg)


def _expect(model_type: type[ModelT], method: str, model: Any, cfg: DictConfig) -> ModelT:
    if not isinstance(model, model_type):
        raise UserError(
            f"model: {cfg.model._component_} does not build a {method} model; use one of "
            f"qst_tune.models.{method.lower()}_*"
        )
    return model


def build_any_on_meta(cfg: DictConfig, dtype: torch.dtype) -> Any:
    """Build what the config's ``model`` block names on meta; ``dtype`` is the default there."""
    with training.set_default_dtype(dtype), torch.device("meta"):
        return instantiate(cfg.model, "model")


def load_frozen_backbone(
    model: TransformerDecoder, cfg: DictConfig, *, dtype: torch.dtype, device: torch.device
) -> BackboneId:
    """Fill the backbone from the config's checkpoint, quantising what the model has quantised.

    ``backbone_sharding`` and ``fsdp_cpu_offload`` of the config decide how much of it each of
    several processes keeps. Returns what the run's result will be tied to. UserError if the
    checkpoint is missing, damaged or not of this architecture.
    """
    checkpoint_dir = check_checkpoint_dir(cfg.checkpointer)
    check_architecture(model, checkpoint_dir)
    start = time.perf_counter()
    checkpointer = instantiate(cfg.checkpointer, "checkpointer")
    offload = bool(cfg.get("fsdp_cpu_offload"))
    sharding = choose_sharding(cfg.get("backbone_sharding"), device, offload=offload)
    quantization = stored_as(model)
    backbone = transformers_backbone(model)
    where: dict[str, Any] = {"dtype": dtype, "device": device}
    if sharding is None:
        fingerprint = _load_whole(model, checkpointer, dtype, device)
    elif cfg.checkpointer.get("cache_dir"):
        raise UserError(
            f"checkpointer.cache_dir={cfg.checkpointer.cache_dir} does not work yet with "
            "backbone_sharding: set it to null"
        )
    elif backbone is not None:
        fingerprint = fingerprint_backbone(model, checkpointer)
        load_sharded_directory(model, backbone, checkpoint_dir, sharding, **where)
    else:
        twin = build_any_on_meta(cfg, dtype)
        fingerprint = load_sharded_backbone(model, twin, checkpointer, sharding, **where)
    if isinstance(model, PEQATransformer):
        model.train_scales()  # of the layers that were loaded
    if rank_and_world_size()[0] == 0:
        log.info(f"backbone loaded in {time.perf_counter() - start:.1f} s")
    return _identity(model, checkpoint_dir, fingerprint, quantization)


def _identity(model: Any, directory: Path, fingerprint: str, quantization: str) -> BackboneId:
    name, revision = model_name(directory)
    library = "torchtune" if transformers_backbone(model) is None else "transformers"
    return BackboneId(name, fingerprint, quantization, revision, library)


def _load_whole(
    model: TransformerDecoder, checkpointer: Any, dtype: torch.dtype, device: torch.device
) -> str:
    """From the cache, if there is one, or from the checkpoint; returns the fingerprint."""
    check_fits(model, device)
    cache = backbone_cache(checkpointer, model, dtype)
    fingerprint = cache.load(model, device) if cache else None
    if fingerprint is None:
        fingerprint = load_backbone(model, checkpointer, dtype=dtype, device=device)
        if cache:
            cache.save(model, fingerprint)
    return fingerprint


def identify_backbone(model: QSTModel, cfg: DictConfig) -> BackboneId:
    """Check the config's checkpoint against a model and identify it, without loading it."""
    checkpoint_dir = check_checkpoint_dir(cfg.checkpointer)
    check_architecture(model, checkpoint_dir)
    checkpointer = instantiate(cfg.checkpointer, "checkpointer")
    fingerprint = fingerprint_backbone(model, checkpointer)
    return _identity(model, checkpoint_dir, fingerprint, stored_as(model))
