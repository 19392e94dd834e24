"""Write a model tuned by peqa_finetune as a Hugging Face directory, for other programs.

Examples::

    tune run peqa_export --config smollm2/135M_peqa_4bit
    tune run peqa_export --config smollm2/135M_peqa_4bit format=gptq export_dir=<DIR>

It takes the config of the training run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig
from torchtune import utils

from qst_tune.config.check import read_config
from qst_tune.config.cli import run_recipe
from qst_tune.config.device import choose_device, choose_dtype
from qst_tune.config.keys import key
from qst_tune.config.model_directory import fetch_models
from qst_tune.config.schema import TunedModelConfig, training_key
from qst_tune.results.export import export_model
from qst_tune.results.loading import load_tuned_model


@dataclass(frozen=True, kw_only=True)
class ExportConfig(TunedModelConfig):
    """The keys of this recipe."""

    output_dir: Path = training_key("output_dir")
    format: Literal["dense", "gptq", "gptq_v2"] = key(
        "dense is read by every program, gptq by programs with kernels for it", default="dense"
    )
    export_dir: Path | None = key("directory to write; null: <output_dir>/<format>", default=None)


log = utils.get_logger("INFO")


def main(raw: DictConfig) -> None:
    """Run the recipe."""
    cfg = fetch_models(read_config(raw, ExportConfig))
    form = cfg.format
    directory = cfg.export_dir or cfg.output_dir / form
    model = load_tuned_model(cfg, "integers").model
    dtype = choose_dtype(cfg.dtype, choose_device(cfg.device))
    checkpoint_dir = Path(cfg.checkpointer.checkpoint_dir)
    export_model(model, checkpoint_dir, directory, form=form, dtype=dtype)
    log.info(f"{form} model written to {directory}")


if __name__ == "__main__":
    run_recipe(main, ExportConfig, __doc__)
