"""Learn from preferences (DPO) with a side network: of two answers, the better one.

Example::

    tune run qst_dpo --config smollm2/135M_qst_dpo dataset.data_files=<PAIRS.jsonl>

The reference model of DPO is the frozen backbone; or, where the run starts from a side network
(``side_network=DIR``: fine-tune first, then learn preferences), the model of the start. The key
``reference`` chooses. One pass through the backbone serves the policy and the reference. Everything
else, checkpoints, resuming, validation and the keys of a config, is that of ``qst_finetune``
(docs/training.md); the result is a side network like any other.
"""

from omegaconf import DictConfig

from qst_tune.config.check import read_config, read_trials
from qst_tune.config.cli import run_recipe
from qst_tune.config.schema import TrainingConfig
from qst_tune.errors import UserError
from qst_tune.estimation.dry_run import describe_run
from qst_tune.models.build import build_on_meta
from qst_tune.modules import QSTClassifier
from qst_tune.training.build_trials import build_trials
from qst_tune.training.methods import QST_REFUSED, load_qst
from qst_tune.training.preference import build_preference_learning, reference_of
from qst_tune.training.run import begin_run, build_trainer
from qst_tune.training.trial_results import fit_trials


def main(raw: DictConfig) -> None:
    """Run the recipe."""
    cfg = read_config(raw, TrainingConfig, QST_REFUSED)
    trials = read_trials(cfg, QST_REFUSED)
    reference = reference_of(cfg)  # fails before anything loads
    with begin_run(cfg, trials.configs) as run:
        cfg = run.cfg
        model = build_on_meta(cfg.model, run.dtype)
        if isinstance(model, QSTClassifier):
            raise UserError(f"model: {cfg.model._component_} classifies; name a language model")
        task, data = build_preference_learning(
            cfg, run.tokenizer, model, seed=run.data_seed, device=run.device
        )
        run.report(model, data)
        if cfg.dry_run:
            if run.is_main:
                print(describe_run(cfg, data, run.device, run.dtype, trials.configs))
            return
        if run.trials:
            each = build_trials(run, trials, model, task, data, is_preference=True)
            return fit_trials(cfg.output_dir, model, each, trials.halving, soup=trials.soup)
        method = load_qst(model, cfg, dtype=run.dtype, device=run.device)
        if reference == "start":
            model.keep_reference()
        build_trainer(run, method, task, data).fit()


if __name__ == "__main__":
    run_recipe(main, TrainingConfig, __doc__)
