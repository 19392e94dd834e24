"""Fine-tune only the scales of an integer model (PEQA), on one device or on many.

Examples::

    tune run peqa_finetune --config smollm2/135M_peqa_4bit
    tune run --nproc_per_node 8 peqa_finetune --config llama3_1/8B_peqa_4bit

The linears are rounded to 4 or 3 bits while the checkpoint is read; their codes never change again.
The result is a set of scales, megabytes, that turns the rounded model into the tuned one. The
config keys are torchtune's: a LoRA config becomes a PEQA config by changing its ``model`` block.
"""

import torch
from omegaconf import DictConfig

from qst_tune.estimation.dry_run import describe_run
from qst_tune.training.architecture_check import check_architecture
from qst_tune.training.cli import instantiate, run_recipe
from qst_tune.training.config_check import check_checkpoint_dir
from qst_tune.training.config_keys import TRAINING_OPTIONAL, TRAINING_REQUIRED
from qst_tune.training.distributed import rank_and_world_size
from qst_tune.training.language_modelling import build_language_modelling
from qst_tune.training.model_setup import build_peqa_on_meta
from qst_tune.training.peqa_method import load_peqa
from qst_tune.training.run_environment import run_environment
from qst_tune.training.saved_run import find_saved_run, set_run_seed
from qst_tune.training.trainer_setup import build_trainer
from qst_tune.training.training_config_check import check_training_config, offloading_problems

REQUIRED_KEYS = TRAINING_REQUIRED
OPTIONAL_KEYS = TRAINING_OPTIONAL
NO_OFFLOADING = "is not supported; set it to False and use enable_activation_checkpointing=True"


def finetune(cfg: DictConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Build everything, what can fail cheaply first, and train.

    Args:
        cfg (DictConfig): the merged config, checked.
        device (torch.device): of this process.
        dtype (torch.dtype): of what is not quantised.
    """
    saved = find_saved_run(cfg)
    seed = set_run_seed(cfg, saved)
    model = build_peqa_on_meta(cfg, dtype)
    tokenizer = instantiate(cfg.tokenizer, "tokenizer")
    task, data = build_language_modelling(cfg, tokenizer, model, seed=seed, device=device)
    if cfg.get("dry_run"):
        check_architecture(model, check_checkpoint_dir(cfg.checkpointer))
        name = "peqa_checkpointed" if cfg.get("enable_activation_checkpointing") else "peqa"
        if rank_and_world_size()[0] == 0:
            print(describe_run(cfg, name, data, device, dtype))
        return
    method = load_peqa(model, cfg, dtype=dtype, device=device)
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
        finetune(cfg, device, dtype)


if __name__ == "__main__":
    run_recipe(main)
