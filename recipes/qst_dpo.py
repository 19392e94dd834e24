"""Learn from preferences (DPO) with a side network: of two answers, the better one.

Example::

    tune run qst_dpo --config smollm2/135M_qst_dpo dataset.data_files=<PAIRS.jsonl>

The reference model of DPO is the frozen backbone; or, where the run starts from a side network
(``side_network=DIR``: fine-tune first, then learn preferences), the model of the start. The key
``reference`` chooses. One pass through the backbone serves the policy and the reference. Everything
else, checkpoints, resuming, validation and the keys of a config, is that of ``qst_finetune``
(docs/training.md); the result is a side network like any other.
"""

from typing import Any

import torch
from omegaconf import DictConfig

from qst_tune.errors import UserError
from qst_tune.estimation.dry_run import describe_run
from qst_tune.modules import QSTClassifier
from qst_tune.modules.qst_model import QSTModel
from qst_tune.training.cli import run_recipe
from qst_tune.training.config_keys import TRAINING_KEYS
from qst_tune.training.memory import GIB, parameter_bytes
from qst_tune.training.model_setup import build_on_meta
from qst_tune.training.preference import build_preference_learning, reference_of
from qst_tune.training.qst_method import REFUSED, QSTMethod, load_qst
from qst_tune.training.trainer_setup import TrainingData
from qst_tune.training.training_run import run_training

KEYS = TRAINING_KEYS


def build_model(cfg: DictConfig, dtype: torch.dtype) -> QSTModel:
    """Build the model on the meta device; UserError if it is a classifier."""
    model = build_on_meta(cfg, dtype)
    if isinstance(model, QSTClassifier):
        raise UserError(f"model: {cfg.model._component_} classifies; name a language model")
    return model


def load_method(
    model: QSTModel, cfg: DictConfig, *, dtype: torch.dtype, device: torch.device
) -> QSTMethod:
    """Load the model, and keep what it starts from if that is the reference."""
    method = load_qst(model, cfg, dtype=dtype, device=device)
    if reference_of(cfg) == "start":
        model.keep_reference()
    return method


def main(cfg: DictConfig) -> None:
    """Run the recipe."""

    def describe(model: Any, data: TrainingData, device: torch.device, dtype: torch.dtype) -> None:
        print(describe_run(cfg, None, data, device, dtype))
        if reference_of(cfg) == "start":
            size = parameter_bytes(model.side) / GIB
            print(f"the reference, a frozen copy of the side network, takes {size:.3f} GiB")

    reference_of(cfg)  # fails before anything loads

    run_training(
        cfg,
        build_model=build_model,
        build_task=build_preference_learning,
        load_method=load_method,
        describe=describe,
        refused=REFUSED,
    )


if __name__ == "__main__":
    run_recipe(main, KEYS, __doc__)
