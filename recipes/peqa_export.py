"""Write a model tuned by peqa_finetune as a Hugging Face directory, for other programs.

Examples::

    tune run peqa_export --config smollm2/135M_peqa_4bit
    tune run peqa_export --config smollm2/135M_peqa_4bit format=gptq export_dir=<DIR>

It takes the config of the training run.
"""

from pathlib import Path

from omegaconf import DictConfig
from torchtune import utils

from qst_tune.config.check import check_config
from qst_tune.config.cli import run_recipe
from qst_tune.config.device import choose_device, choose_dtype
from qst_tune.config.keys import Key, pick, setting
from qst_tune.results.export import export_model
from qst_tune.results.loading import MODEL_KEYS, load_tuned_model

KEYS = {
    **pick("model", "checkpointer", "output_dir", "device", "dtype"),
    "scales": MODEL_KEYS["scales"],
    "format": Key(
        kind=str,
        default="dense",
        choices=("dense", "gptq", "gptq_v2"),
        meaning="dense is read by every program, gptq by programs with kernels for it",
    ),
    "export_dir": Key(kind=Path, meaning="directory to write; null: <output_dir>/<format>"),
}

log = utils.get_logger("INFO")


def main(cfg: DictConfig) -> None:
    """Run the recipe."""
    check_config(cfg, KEYS)
    form = setting(cfg, "format", KEYS)
    directory = Path(cfg.get("export_dir") or Path(cfg.output_dir) / form)
    model = load_tuned_model(cfg, "integers").model
    dtype = choose_dtype(cfg, choose_device(cfg))
    checkpoint_dir = Path(cfg.checkpointer.checkpoint_dir)
    export_model(model, checkpoint_dir, directory, form=form, dtype=dtype)
    log.info(f"{form} model written to {directory}")


if __name__ == "__main__":
    run_recipe(main, KEYS, __doc__)
