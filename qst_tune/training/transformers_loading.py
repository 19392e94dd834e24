"""Fill a backbone of transformers from the config's checkpoint directory."""

import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import utils

from qst_tune.backbone.fingerprint import fingerprint_files
from qst_tune.backbone.loading import check_same, load_backbone
from qst_tune.backbone.peqa_transformer import PEQATransformer
from qst_tune.backbone.transformers_model import TransformersModel
from qst_tune.errors import UserError
from qst_tune.models.hf.folder import weight_files
from qst_tune.training.backbone_sizes import check_fits
from qst_tune.training.distributed import rank_and_world_size
from qst_tune.training.sharding import choose_sharding, load_sharded_directory
from qst_tune.training.tuned_folder import BackboneId

log = utils.get_logger("INFO")


def load_transformers_backbone(
    model: TransformersModel,
    cfg: DictConfig,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> BackboneId:
    """Fill the backbone, quantising what the model has quantised.

    Args:
        model (TransformersModel): built on meta; changed in place.
        cfg (DictConfig): the merged config.
        folder (Path): the checkpoint's directory.
        dtype (torch.dtype): of what is not quantised.
        device (torch.device): of the backbone.

    Returns:
        BackboneId: what the run's result will be tied to.

    Raises:
        UserError: if a setting needs torchtune's modules, or the checkpoint cannot be loaded.
    """
    _check_settings(model, cfg)
    start = time.perf_counter()
    identity = identify_transformers_backbone(model, folder)
    offload = bool(cfg.get("fsdp_cpu_offload"))
    sharding = choose_sharding(cfg.get("backbone_sharding"), device, offload=offload)
    where: dict[str, Any] = {"dtype": dtype, "device": device, "files": weight_files(folder)}
    if sharding is None:
        check_fits(model, device)
        load_backbone(model.backbone, folder, **where)
    else:
        load_sharded_directory(model, model.backbone, folder, sharding, **where)
    if isinstance(model, PEQATransformer):
        model.train_scales()  # of the layers that were loaded
    if rank_and_world_size()[0] == 0:
        log.info(
            f"backbone loaded in {time.perf_counter() - start:.1f} s "
            f"(model_type={model.backbone.config.model_type}, transformers' own model)"
        )
    return identity


def identify_transformers_backbone(model: TransformersModel, folder: Path) -> BackboneId:
    """Identify the weights that a backbone will be loaded from; little of them is read.

    Args:
        model (TransformersModel): may be on meta.
        folder (Path): the checkpoint's directory.

    Returns:
        BackboneId: what the run's result will be tied to.

    Raises:
        UserError: if the directory describes another model, or a file is missing or damaged.
    """
    check_same(model.backbone, folder)
    fingerprint = fingerprint_files(weight_files(folder))
    return BackboneId(folder.resolve().name, fingerprint, model.backbone.quantization)


def _check_settings(model: TransformersModel, cfg: DictConfig) -> None:
    kind = f"model_type={model.backbone.config.model_type}, which runs as transformers' own model"
    if cfg.checkpointer.get("cache_dir"):
        raise UserError(
            f"checkpointer.cache_dir={cfg.checkpointer.cache_dir} does not work yet with {kind}: "
            "set it to null"
        )
