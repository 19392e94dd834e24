"""Write a model tuned by peqa_finetune as a Hugging Face directory, for other programs.

Examples::

    tune run peqa_export --config smollm2/135M_peqa_4bit
    tune run peqa_export --config smollm2/135M_peqa_4bit format=gptq export_dir=<DIR>

It takes the config of the training run.
"""

from pathlib import Path

from omegaconf import DictConfig
from torchtune import utils

from qst_tune.config.check import check_checkpoint_dir, check_config
from qst_tune.config.cli import run_recipe
from qst_tune.config.device import choose_device, choose_dtype
from qst_tune.config.hub_models import fetch_models
from qst_tune.config.keys import Key, pick, setting
from qst_tune.models.build import build_peqa_on_meta
from qst_tune.models.load import load_frozen_backbone
from qst_tune.results.export import check_export_format, export_model
from qst_tune.results.scales import load_scales
from qst_tune.results.start import tuned_directory
from qst_tune.results.tuned_model import MODEL_KEYS

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
    form = check_export_format(setting(cfg, "format", KEYS))
    fetch_models(cfg)
    checkpoint_dir = check_checkpoint_dir(cfg.checkpointer)
    device = choose_device(cfg)
    dtype = choose_dtype(cfg, device)
    output_dir = Path(cfg.output_dir)
    scales = tuned_directory(cfg, "scales")
    directory = Path(cfg.get("export_dir") or output_dir / form)
    model = build_peqa_on_meta(cfg, dtype)
    backbone = load_frozen_backbone(model, cfg, dtype=dtype, device=device)
    if scales:
        load_scales(scales, model, backbone=backbone)
    export_model(model, checkpoint_dir, directory, form=form, dtype=dtype)
    log.info(f"{form} model written to {directory}")


if __name__ == "__main__":
    run_recipe(main, KEYS, __doc__)
