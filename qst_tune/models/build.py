"""Build the model that a config's ``model`` block names, on the meta device."""

from typing import Any, TypeVar

import torch
from torchtune import training

from qst_tune.config.components import instantiate
from qst_tune.config.schema import Block
from qst_tune.errors import UserError
from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.modules.qst_model import QSTModel

ModelT = TypeVar("ModelT", QSTModel, PEQAModel)


def build_on_meta(block: Block, dtype: torch.dtype) -> QSTModel:
    """Build the QST model of a ``model`` block on meta; UserError if it builds another."""
    return _expect(QSTModel, "QST", block, dtype)


def build_peqa_on_meta(block: Block, dtype: torch.dtype) -> PEQAModel:
    """Build the PEQA model of a ``model`` block on meta; UserError if it builds another."""
    return _expect(PEQAModel, "PEQA", block, dtype)


def _expect(model_type: type[ModelT], method: str, block: Block, dtype: torch.dtype) -> ModelT:
    model = build_any_on_meta(block, dtype)
    if not isinstance(model, model_type):
        raise UserError(
            f"model: {block._component_} does not build a {method} model; use one of "
            f"qst_tune.models.{method.lower()}_*"
        )
    return model


def build_any_on_meta(block: Block, dtype: torch.dtype) -> Any:
    """Build what a ``model`` block names on meta; ``dtype`` is the default there."""
    with training.set_default_dtype(dtype), torch.device("meta"):
        return instantiate(block, "model")
