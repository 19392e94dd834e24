"""From a config to a loaded model with what was tuned, whichever method tuned it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune.modules.peft import disable_adapter

from qst_tune.backbone.identity import BackboneId
from qst_tune.config.check import check_checkpoint_dir
from qst_tune.config.cli import instantiate
from qst_tune.config.device import choose_device, choose_dtype
from qst_tune.config.hub_models import fetch_models
from qst_tune.config.keys import Key, pick
from qst_tune.errors import UserError
from qst_tune.models.build import build_any_on_meta
from qst_tune.models.load import load_frozen_backbone
from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.modules.qst_model import QSTModel
from qst_tune.results.scales import load_scales
from qst_tune.results.side_network import load_side_network
from qst_tune.results.start import tuned_directory

# What a recipe that uses a tuned model reads of its config; that of the training run has it all.
MODEL_KEYS = {
    **pick("model", "tokenizer", "checkpointer", "device", "dtype"),
    "side_network": Key(
        kind=Path,
        default="<output_dir>/side_network",
        meaning="directory of a QST run's result; null: the base model",
    ),
    "scales": Key(
        kind=Path,
        default="<output_dir>/scales",
        meaning="directory of a PEQA run's result; null: the base model",
    ),
    **pick("output_dir", required=False),
}

# Key of the config, which is also the directory's name in a run's output_dir.
_KEYS: dict[type, str] = {QSTModel: "side_network", PEQAModel: "scales"}
_TITLES = {"side_network": "with the side network", "scales": "with the tuned scales"}


@dataclass(frozen=True)
class TunedModel:
    """A model on its device, in evaluation mode, that can be used tuned or as it was.

    Args:
        model (Any): a ``QSTModel`` or ``PEQAModel``.
        tokenizer (Any): torchtune model tokenizer, which cuts nothing.
        backbone (BackboneId): what the model was loaded from.
        title (str): what the tuned model is, for people.
        is_tuned (bool): whether there is anything tuned to use.
        untuned_scales (dict[str, torch.Tensor]): of a PEQA model, as rounding left them.
    """

    model: Any
    tokenizer: Any
    backbone: BackboneId
    title: str
    is_tuned: bool
    untuned_scales: dict[str, torch.Tensor]

    @contextmanager
    def untuned(self) -> Iterator[None]:
        """Make the model the quantised base model for as long as the context lasts."""
        if isinstance(self.model, QSTModel):
            with disable_adapter(self.model):
                yield
            return
        tuned = {name: value.clone() for name, value in self.model.task().items()}
        self.model.load_task(self.untuned_scales)
        try:
            yield
        finally:
            self.model.load_task(tuned)


def load_tuned_model(cfg: DictConfig, *, classifies: bool = False) -> TunedModel:
    """Load a model that writes text, or one that classifies, with its side network or scales.

    ``side_network`` (QST) or ``scales`` (PEQA) names the directory of the result; null is the base
    model. Without the key, or if it names what the run started from, it is the result in
    ``output_dir``. UserError if the model is of another kind, or the result does not fit it.
    """
    check_checkpoint_dir(cfg.checkpointer)
    fetch_models(cfg)
    device = choose_device(cfg)
    dtype = choose_dtype(cfg, device)
    model = build_any_on_meta(cfg, dtype)
    key = _key_of(model, cfg, classifies)
    tuned = tuned_directory(cfg, key)
    tokenizer = instantiate(_without_limit(cfg.tokenizer), "tokenizer")
    backbone = load_frozen_backbone(model, cfg, dtype=dtype, device=device)
    untuned_scales = {}
    if isinstance(model, QSTModel):
        model.side.materialize(device)
        if tuned:
            load_side_network(tuned, model.side, backbone=backbone)
    else:
        untuned_scales = {name: value.detach().clone() for name, value in model.task().items()}
        if tuned:
            load_scales(tuned, model, backbone=backbone)
    model.eval()
    return TunedModel(model, tokenizer, backbone, _TITLES[key], bool(tuned), untuned_scales)


def _key_of(model: Any, cfg: DictConfig, classifies: bool) -> str:
    """The key that names what was tuned; the other method's must not be set."""
    if classifies and not isinstance(model, QSTClassifier):
        raise UserError(f"model: {cfg.model._component_} does not build a classifier")
    is_text_model = isinstance(model, tuple(_KEYS)) and not isinstance(model, QSTClassifier)
    if not (classifies or is_text_model):
        raise UserError(
            f"model: {cfg.model._component_} builds no model that writes text; use one of "
            "qst_tune.models.qst_* or peqa_*"
        )
    key = next(key for kind, key in _KEYS.items() if isinstance(model, kind))
    for other in set(_KEYS.values()) - {key}:
        if cfg.get(other):
            raise UserError(f"{other}={cfg[other]} does not go with this model: it takes {key}")
    return key


def _without_limit(block: DictConfig) -> DictConfig:
    """A tokenizer that cuts nothing: what training cuts off is where the answer would begin."""
    if "max_seq_len" not in block:
        return block
    unlimited = block.copy()
    unlimited.max_seq_len = None
    return unlimited
