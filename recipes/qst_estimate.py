"""Estimate memory and cost of a training config before it runs.

Examples::

    tune run qst_estimate --config llama2/7B_qst batch_size=16 tokenizer.max_seq_len=2048
    tune run qst_estimate --config llama3_1/8B_qst tokenizer.max_seq_len=1024 fit_gib=24

Neither weights nor tokenizer, data or GPU are needed: the model and the loss of the config run one
training step on tensors that have shapes but no memory, and every allocation is counted. Of a model
on the hub only ``config.json`` is downloaded. ``python -m benchmarks.estimate`` puts torchtune's
QLoRA, LoRA and full fine-tuning beside it.
"""

from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import utils

from qst_tune.config.check import read_config
from qst_tune.config.cli import run_recipe
from qst_tune.config.device import AUTO, DTYPE_NAMES
from qst_tune.config.model_directory import fetch_models
from qst_tune.config.schema import EstimateConfig
from qst_tune.errors import UserError
from qst_tune.estimation.estimate import DEFAULT_SEQ_LEN, JSON_FILE, Question, table, write
from qst_tune.estimation.fake_device import DeviceType
from qst_tune.estimation.spread import Spread
from qst_tune.estimation.step import Shape, own_setup
from qst_tune.results.output_directory import output_directory

log = utils.get_logger("INFO")


class QSTEstimateRecipe:
    """Estimate a step of the config's model, and its largest batch if asked."""

    def __init__(self, cfg: EstimateConfig) -> None:
        self.cfg = cfg
        self.dtype = _dtype(cfg.dtype)
        self.question = Question(
            lambda: own_setup(cfg, self.dtype),
            cfg,
            Shape(cfg.batch_size, self._seq_len()),
            device=_device_type(cfg.device),
            attention=cfg.attention,
            spread=Spread.of_config(cfg, cfg.num_processes),
            fit_gib=cfg.fit_gib,
        )

    def _seq_len(self) -> int:
        length = self.cfg.tokenizer.get("max_seq_len")
        if length is not None:
            return _positive(length, "tokenizer.max_seq_len")
        log.info(
            f"tokenizer.max_seq_len is null, so rows have the length of the data: "
            f"estimating {DEFAULT_SEQ_LEN} tokens a row"
        )
        return DEFAULT_SEQ_LEN

    def run(self) -> None:
        """Print the table and write it."""
        asked = self.question
        row, spread = asked.answer()
        print(
            f"\n{self.cfg.model._component_}, {asked.shape.batch_size} x {asked.shape.seq_len} "
            f"tokens, {DTYPE_NAMES[self.dtype]}, {asked.device}\n"
            f"peak memory of one training step and its parts, GiB (2^30 bytes)\n\n{table([row])}\n"
        )
        if spread:
            print(spread)
        if asked.fit_gib:
            print(
                f"largest batch of {asked.shape.seq_len} tokens a row that fits in "
                f"{asked.fit_gib:g} GiB: {row.largest_batch or 'none'}"
            )
        directory = self.cfg.output_dir
        write(directory, row, self._settings())
        print(f"{directory / JSON_FILE} written")

    def _settings(self) -> dict[str, object]:
        asked = self.question
        return {
            "model": str(self.cfg.model._component_),
            "batch_size": asked.shape.batch_size,
            "seq_len": asked.shape.seq_len,
            "dtype": DTYPE_NAMES[self.dtype],
            "device": asked.device,
            "attention": asked.attention,
            "fit_gib": asked.fit_gib,
            "num_processes": asked.spread.num_processes,
            "backbone_sharding": asked.spread.mode,
        }


def _device_type(device: str) -> DeviceType:
    kind = device.partition(":")[0]
    if kind == "cpu":
        return "cpu"
    if kind in ("cuda", AUTO):  # a GPU to come, whatever this machine has: the title names it
        return "cuda"
    raise UserError(f"device={device} cannot be estimated: use cpu or cuda")


def _dtype(dtype: str) -> torch.dtype:
    dtypes = {AUTO: torch.bfloat16, **{name: dtype for dtype, name in DTYPE_NAMES.items()}}
    if dtype not in dtypes:
        raise UserError(f"dtype={dtype} is not supported: use bf16, fp16 or fp32")
    return dtypes[dtype]


def _positive(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}={value} must be a whole number of at least 1")
    return value


def main(raw: DictConfig) -> None:
    """Run the recipe."""
    cfg = fetch_models(read_config(raw, EstimateConfig), "config")
    recipe = QSTEstimateRecipe(cfg)
    with output_directory(cfg.output_dir):
        recipe.run()


if __name__ == "__main__":
    run_recipe(main, EstimateConfig, __doc__)
