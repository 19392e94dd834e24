"""Fine-tune only the scales of an integer model (PEQA), on one device or on many.

Examples::

    tune run peqa_finetune --config smollm2/135M_peqa_4bit
    tune run --nproc_per_node 8 peqa_finetune --config llama3_1/8B_peqa_4bit

The linears are rounded to 4 or 3 bits while the checkpoint is read; their codes never change again.
The result is a set of scales, megabytes, that turns the rounded model into the tuned one. The
config keys are torchtune's: a LoRA config becomes a PEQA config by changing its ``model`` block.
"""

from omegaconf import DictConfig

from qst_tune.config.check import read_config
from qst_tune.config.cli import run_recipe
from qst_tune.config.schema import TrainingConfig
from qst_tune.estimation.dry_run import describe_run
from qst_tune.models.build import build_peqa_on_meta
from qst_tune.training.language_modelling import build_language_modelling
from qst_tune.training.methods import load_peqa
from qst_tune.training.run import begin_run, build_trainer

REFUSED = {
    "trials": "share the pass of a frozen backbone, which PEQA trains inside of: use QST",
    "reference": "is for qst_dpo; remove it",
    "side_network": "is what QST starts from; use scales",
    "enable_activation_offloading": "is not supported; set it to False and use "
    "enable_activation_checkpointing=True",
    "hidden_state_cache": "is for QST: PEQA trains inside the model, whose hidden states change "
    "with every step; set it to null",
}


def main(raw: DictConfig) -> None:
    """Run the recipe."""
    with begin_run(read_config(raw, TrainingConfig, REFUSED)) as run:
        cfg = run.cfg
        model = build_peqa_on_meta(cfg.model, run.dtype)
        task, data = build_language_modelling(
            cfg, run.tokenizer, model, seed=run.data_seed, device=run.device
        )
        run.report(model, data)
        if cfg.dry_run:
            if run.is_main:
                print(describe_run(cfg, data, run.device, run.dtype))
            return
        method = load_peqa(model, cfg, dtype=run.dtype, device=run.device)
        build_trainer(run, method, task, data).fit()


if __name__ == "__main__":
    run_recipe(main, TrainingConfig, __doc__)
