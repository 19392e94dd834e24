"""Build the model that a config's ``model`` block names, on the meta device."""

from typing import Any, TypeVar

import torch
from omegaconf import DictConfig
from torchtune import training

from qst_tune.config.cli import instantiate
from qst_tune.errors import UserError
from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.modules.qst_model import QSTModel

ModelT = TypeVar("ModelT", QSTModel, PEQAModel)


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
