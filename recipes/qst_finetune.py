"""Fine-tune a language model with Quantized Side Tuning (QST), on one device or on many.

Examples::

    tune run qst_finetune --config smollm2/135M_qst
    tune run --nproc_per_node 8 qst_finetune --config llama3_1/8B_qst
    tune run qst_finetune --config smollm2/135M_qst_dial
    tune run qst_finetune --config smollm2/135M_qst_sst2

The backbone is frozen in NF4 and only runs forward; a small side network trains, and with
``model.lora_layers`` LoRA in the last layers too. The config keys are torchtune's: a LoRA config
becomes a QST config by changing its ``model`` block. With ``qst_tune.models.qst_classifier`` there,
it learns to classify rows instead of to continue them. The keys added to torchtune's (checkpoints,
resuming, validation, ``dry_run``) are in docs/training.md.
"""

from functools import partial

from omegaconf import DictConfig

from qst_tune.config.check import read_config, read_trials
from qst_tune.config.cli import run_recipe
from qst_tune.config.schema import TrainingConfig
from qst_tune.data import collate_classification
from qst_tune.data.batches.training_data import TrainingData, build_data
from qst_tune.estimation.dry_run import describe_run
from qst_tune.models.build import build_on_meta
from qst_tune.modules.model_limits import limits_of
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.modules.qst_model import QSTModel
from qst_tune.training.build_trials import build_trials
from qst_tune.training.classification import build_classification_task
from qst_tune.training.language_modelling import build_language_modelling
from qst_tune.training.methods import QST_REFUSED, load_qst
from qst_tune.training.run import Run, begin_run, build_trainer
from qst_tune.training.task import Task
from qst_tune.training.trial_results import fit_trials

REFUSED = {**QST_REFUSED, "reference": "is for qst_dpo; remove it"}


def build_task(run: Run, model: QSTModel) -> tuple[Task, TrainingData]:
    """Build what the model learns, to classify or to continue a text, and its data."""
    cfg, tokenizer, seed, device = run.cfg, run.tokenizer, run.data_seed, run.device
    if not isinstance(model, QSTClassifier):
        return build_language_modelling(cfg, tokenizer, model, seed=seed, device=device)
    limits = limits_of(model, tokenizer)
    pad_id, longest = limits.pad_id, limits.max_seq_len
    collate = partial(collate_classification, pad_id=pad_id, max_seq_len=longest)
    data = build_data(cfg, limits, collate, seed=seed)
    datasets = [loader.dataset for loader in (data.train, data.validation) if loader]
    return build_classification_task(cfg.loss, model, datasets, device), data


def main(raw: DictConfig) -> None:
    """Run the recipe."""
    cfg = read_config(raw, TrainingConfig, REFUSED)
    trials = read_trials(cfg, REFUSED)
    with begin_run(cfg, trials.configs) as run:
        cfg = run.cfg
        model = build_on_meta(cfg.model, run.dtype)
        task, data = build_task(run, model)
        run.report(model, data)
        if cfg.dry_run:
            if run.is_main:
                print(describe_run(cfg, data, run.device, run.dtype, trials.configs))
            return
        if run.trials:
            each = build_trials(run, trials, model, task, data)
            return fit_trials(cfg.output_dir, model, each, trials.halving, soup=trials.soup)
        method = load_qst(model, cfg, dtype=run.dtype, device=run.device)
        build_trainer(run, method, task, data).fit()


if __name__ == "__main__":
    run_recipe(main, TrainingConfig, __doc__)
