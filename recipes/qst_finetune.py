"""Fine-tune a language model with Quantized Side Tuning (QST), on one device or on many.

Examples::

    tune run qst_finetune --config smollm2/135M_qst
    tune run --nproc_per_node 8 qst_finetune --config llama3_1/8B_qst
    tune run qst_finetune --config smollm2/135M_qst_sst2

The backbone is frozen in NF4 and only runs forward; a small side network trains. The config keys
are torchtune's: a LoRA config becomes a QST config by changing its ``model`` block. With
``qst_tune.models.qst_classifier`` there, it learns to classify rows instead of to continue them.
The keys added to torchtune's (checkpoints, resuming, validation, ``dry_run``) are in
docs/training.md.
"""

from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig

from qst_tune.data import collate_classification
from qst_tune.estimation.dry_run import describe_run
from qst_tune.modules import QSTClassifier
from qst_tune.training.architecture_check import check_architecture
from qst_tune.training.classification import build_classification_task
from qst_tune.training.cli import instantiate, run_recipe
from qst_tune.training.config_check import check_checkpoint_dir
from qst_tune.training.config_keys import TRAINING_OPTIONAL, TRAINING_REQUIRED
from qst_tune.training.distributed import rank_and_world_size
from qst_tune.training.language_modelling import build_language_modelling
from qst_tune.training.method import Task
from qst_tune.training.model_setup import build_on_meta
from qst_tune.training.qst_method import load_qst
from qst_tune.training.run_environment import run_environment
from qst_tune.training.saved_run import find_saved_run, set_run_seed
from qst_tune.training.trainer_setup import TrainingData, build_data, build_trainer
from qst_tune.training.training_config_check import check_training_config, offloading_problems

REQUIRED_KEYS = TRAINING_REQUIRED
OPTIONAL_KEYS = TRAINING_OPTIONAL
NO_OFFLOADING = (
    "has nothing to offload, since QST keeps no activation of the backbone; set it to False"
)


def finetune(cfg: DictConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Build everything, what can fail cheaply first, and train.

    Args:
        cfg (DictConfig): the merged config, checked.
        device (torch.device): of this process.
        dtype (torch.dtype): of what is not quantised.
    """
    saved = find_saved_run(cfg)
    seed = set_run_seed(cfg, saved)
    model = build_on_meta(cfg, dtype)
    tokenizer = instantiate(cfg.tokenizer, "tokenizer")
    is_classifier = isinstance(model, QSTClassifier)
    build_task = build_classification if is_classifier else build_language_modelling
    task, data = build_task(cfg, tokenizer, model, seed=seed, device=device)
    if cfg.get("dry_run"):
        check_architecture(model, check_checkpoint_dir(cfg.checkpointer))
        if rank_and_world_size()[0] == 0:
            print(describe_run(cfg, None if is_classifier else "qst", data, device, dtype))
        return
    method = load_qst(model, cfg, dtype=dtype, device=device)
    build_trainer(cfg, method, task, data, device, saved).fit()


def build_classification(
    cfg: DictConfig, tokenizer: Any, model: QSTClassifier, *, seed: int, device: torch.device
) -> tuple[Task, TrainingData]:
    """Build the task of classifying whole rows, and its data.

    Args:
        cfg (DictConfig): the merged config.
        tokenizer (Any): torchtune model tokenizer.
        model (QSTClassifier): the model.
        seed (int): of the order of rows.
        device (torch.device): the model's.

    Returns:
        tuple[Task, TrainingData]: what is learnt and from what.
    """
    collate = partial(
        collate_classification, pad_id=tokenizer.pad_id, max_seq_len=model.max_seq_len
    )
    data = build_data(cfg, tokenizer, collate, seed=seed, max_seq_len=model.max_seq_len)
    datasets = [loader.dataset for loader in (data.train, data.held_out) if loader]
    return build_classification_task(cfg, model, datasets, device), data


def main(cfg: DictConfig) -> None:
    """Run the recipe.

    Args:
        cfg (DictConfig): the merged config.

    Raises:
        UserError: for a wrong config, checkpoint or dataset.
    """
    check_training_config(cfg, offloading_problems(cfg, NO_OFFLOADING))
    with run_environment(cfg) as (device, dtype):
        finetune(cfg, device, dtype)


if __name__ == "__main__":
    run_recipe(main)
