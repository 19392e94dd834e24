"""Learn from preferences (DPO) with a side network: of two answers, the better one.

Example::

    tune run qst_dpo --config smollm2/135M_qst_dpo dataset.data_files=<PAIRS.jsonl>

The reference model of DPO is the frozen backbone itself, so one pass through it serves the policy
and the reference. Everything else, checkpoints, resuming, validation and the keys of a config, is
that of ``qst_finetune`` (docs/training.md); the result is a side network like any other.
"""

import torch
from omegaconf import DictConfig

from qst_tune.errors import UserError
from qst_tune.estimation.dry_run import describe_run
from qst_tune.modules import QSTClassifier
from qst_tune.training.architecture_check import check_architecture
from qst_tune.training.cli import instantiate, run_recipe
from qst_tune.training.config_check import check_checkpoint_dir
from qst_tune.training.config_keys import TRAINING_OPTIONAL, TRAINING_REQUIRED
from qst_tune.training.distributed import rank_and_world_size
from qst_tune.training.model_setup import build_on_meta
from qst_tune.training.preference import build_preference_learning
from qst_tune.training.qst_method import load_qst
from qst_tune.training.run_environment import run_environment
from qst_tune.training.saved_run import find_saved_run, set_run_seed
from qst_tune.training.trainer_setup import build_trainer
from qst_tune.training.training_config_check import check_training_config, offloading_problems

REQUIRED_KEYS = TRAINING_REQUIRED
OPTIONAL_KEYS = TRAINING_OPTIONAL
NO_OFFLOADING = (
    "has nothing to offload, since QST keeps no activation of the backbone; set it to False"
)


def learn(cfg: DictConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Build everything, what can fail cheaply first, and train.

    Args:
        cfg (DictConfig): the merged config, checked.
        device (torch.device): of this process.
        dtype (torch.dtype): of what is not quantised.

    Raises:
        UserError: if the model is a classifier.
    """
    saved = find_saved_run(cfg)
    seed = set_run_seed(cfg, saved)
    model = build_on_meta(cfg, dtype)
    tokenizer = instantiate(cfg.tokenizer, "tokenizer")
    if isinstance(model, QSTClassifier):
        raise UserError(f"model: {cfg.model._component_} classifies; name a language model")
    task, data = build_preference_learning(cfg, tokenizer, model, seed=seed, device=device)
    if cfg.get("dry_run"):
        check_architecture(model, check_checkpoint_dir(cfg.checkpointer))
        if rank_and_world_size()[0] == 0:
            print(describe_run(cfg, None, data, device, dtype))
        return
    method = load_qst(model, cfg, dtype=dtype, device=device)
    build_trainer(cfg, method, task, data, device, saved).fit()


def main(cfg: DictConfig) -> None:
    """Run the recipe.

    Args:
        cfg (DictConfig): the merged config.

    Raises:
        UserError: for a wrong config, checkpoint or dataset.
    """
    check_training_config(cfg, offloading_problems(cfg, NO_OFFLOADING))
    with run_environment(cfg) as (device, dtype):
        learn(cfg, device, dtype)


if __name__ == "__main__":
    run_recipe(main)
