"""Fill the frozen backbone of a model on meta from the config's checkpoint, and identify it."""

import time
from typing import Any

import torch
from torchtune import utils

from qst_tune.backbone.hf_checkpointer import backbone_cache
from qst_tune.backbone.hub import model_name
from qst_tune.backbone.identity import BackboneId, Fingerprint
from qst_tune.backbone.sharded_loading import load_sharded_backbone, load_sharded_directory
from qst_tune.backbone.torchtune_loading import (
    check_architecture,
    fingerprint_backbone,
    load_backbone,
    stored_as,
)
from qst_tune.backbone.transformers import transformers_backbone
from qst_tune.backbone.transformers_models import PEQATransformer
from qst_tune.config.components import instantiate
from qst_tune.config.model_directory import check_checkpoint_dir
from qst_tune.config.schema import Block
from qst_tune.distributed.processes import is_main_process
from qst_tune.distributed.sharding import Sharding, check_memory
from qst_tune.errors import UserError
from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.modules.qst_model import QSTModel

log = utils.get_logger("INFO")


def load_frozen_backbone(
    model: QSTModel | PEQAModel,
    block: Block,
    *,
    dtype: torch.dtype,
    device: torch.device,
    sharding: Sharding | None = None,
    twin: QSTModel | PEQAModel | None = None,
) -> BackboneId:
    """Fill the backbone as a ``checkpointer`` block has it, quantising what the model quantises.

    With ``sharding`` each process keeps its part only; ``twin`` is another model built alike, in
    which torchtune's weights are quantised on the way. Returns what the run's result will be tied
    to. UserError if the checkpoint is missing, damaged or not of this architecture.
    """
    start = time.perf_counter()
    checkpointer = _checked(model, block)
    quantization = stored_as(model)
    if sharding is None:
        fingerprint = _load_whole(model, checkpointer, dtype, device)
    else:
        where = {"dtype": dtype, "device": device}
        fingerprint = _load_sharded(model, twin, block, checkpointer, sharding, **where)
    if isinstance(model, PEQATransformer):
        model.train_scales()  # of the layers that were loaded
    if is_main_process():
        log.info(f"backbone loaded in {time.perf_counter() - start:.1f} s")
    return _identity(model, block, fingerprint, quantization)


def identify_backbone(model: QSTModel | PEQAModel, block: Block) -> BackboneId:
    """Check a checkpoint against a model and identify it, without loading it."""
    fingerprint = fingerprint_backbone(model, _checked(model, block))
    return _identity(model, block, fingerprint, stored_as(model))


def _checked(model: Any, block: Block) -> Any:
    """The checkpointer, of a checkpoint that the model fits."""
    check_architecture(model, check_checkpoint_dir(block))
    return instantiate(block, "checkpointer")


def _load_whole(
    model: Any, checkpointer: Any, dtype: torch.dtype, device: torch.device
) -> Fingerprint:
    """From the cache, if there is one, or from the checkpoint."""
    check_memory(model, device)
    cache = backbone_cache(checkpointer, model, dtype)
    found = cache.load(model, device) if cache else None
    if found is not None:
        return found
    fingerprint = load_backbone(model, checkpointer, dtype=dtype, device=device)
    if cache:
        cache.save(model, fingerprint)
    return fingerprint


def _load_sharded(
    model: Any, twin: Any, block: Block, checkpointer: Any, sharding: Sharding, **where: Any
) -> Fingerprint:
    if block.get("cache_dir"):
        raise UserError(
            f"checkpointer.cache_dir={block.cache_dir} does not work yet with "
            "backbone_sharding: set it to null"
        )
    backbone = transformers_backbone(model)
    if backbone is None:
        return load_sharded_backbone(model, twin, checkpointer, sharding, **where)
    directory = check_checkpoint_dir(block)
    return load_sharded_directory(model, backbone, directory, sharding, **where)


def _identity(model: Any, block: Block, fingerprint: Fingerprint, quantization: str) -> BackboneId:
    name, revision = model_name(check_checkpoint_dir(block))
    library = "torchtune" if transformers_backbone(model) is None else "transformers"
    full, sampled = fingerprint
    return BackboneId(name, full, quantization, revision, library, sampled)
