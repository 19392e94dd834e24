"""Estimate memory and cost of a training config before it runs.

Examples::

    tune run qst_estimate --config llama2/7B_qst batch_size=16 tokenizer.max_seq_len=2048
    tune run qst_estimate --config llama3_1/8B_qst tokenizer.max_seq_len=1024 fit_gib=24

Neither weights nor tokenizer, data or GPU are needed: the model and the loss of the config run one
training step on tensors that have shapes but no memory, and every allocation is counted. The same
is done for PEQA and for torchtune's QLoRA, LoRA and full fine-tuning of the same backbone.
"""

from pathlib import Path
from typing import Any, get_args

import torch
from omegaconf import DictConfig
from torchtune import utils

from qst_tune.errors import UserError
from qst_tune.estimation.comparison import Question, estimate_rows
from qst_tune.estimation.dry_run import DEFAULT_SEQ_LEN
from qst_tune.estimation.fake_device import Attention, DeviceType
from qst_tune.estimation.methods import DEFAULT_METHODS, Choices, choose_methods
from qst_tune.estimation.report import JSON_FILE, PLOT_FILE, fit_line, table, write
from qst_tune.estimation.spread import Spread
from qst_tune.estimation.step import Shape
from qst_tune.training.automatic import AUTO, DTYPE_NAMES
from qst_tune.training.cli import run_recipe
from qst_tune.training.config_check import check_config
from qst_tune.training.config_keys import Key, pick, setting
from qst_tune.training.hub_models import fetch_models
from qst_tune.training.output_folder import output_folder

KEYS = {
    "fit_gib": Key(kind=float, above=0, meaning="look for the largest batch within so many GiB"),
    "methods": Key(
        kind=list, meaning=f"rows of the table, or [all]; null: [{','.join(DEFAULT_METHODS)}]"
    ),
    "lora_rank": Key(
        kind=int, default=16, least=1, meaning="of LoRA and QLoRA, on all linears of a layer"
    ),
    "attention": Key(
        kind=str,
        default="fused",
        choices=get_args(Attention),
        meaning="plain holds the scores, fused never does",
    ),
    "num_processes": Key(
        kind=int, default=1, least=1, meaning="that share the work, as backbone_sharding has it"
    ),
    **pick("model", "tokenizer", "batch_size", "optimizer", "loss", "output_dir"),
    **pick("device", "dtype", "clip_grad_norm", "enable_activation_checkpointing"),
    **pick("backbone_sharding", "gradient_accumulation_steps"),
}

log = utils.get_logger("INFO")


class QSTEstimateRecipe:
    """Estimate each method once, and its largest batch if asked."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.device = _device_type(str(setting(cfg, "device", KEYS)))
        self.attention: Attention = setting(cfg, "attention", KEYS)
        self.shape = Shape(cfg.batch_size, self._seq_len())
        self.methods = choose_methods(list(cfg.get("methods") or DEFAULT_METHODS))
        self.choices = Choices(
            cfg, _dtype(str(setting(cfg, "dtype", KEYS))), lora_rank=setting(cfg, "lora_rank", KEYS)
        )
        self.question = Question(
            self.choices,
            self.shape,
            device=self.device,
            attention=self.attention,
            spread=Spread.of_config(cfg, setting(cfg, "num_processes", KEYS)),
            fit_gib=setting(cfg, "fit_gib", KEYS),
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
        found = estimate_rows(self.question, list(self.methods))
        rows = {name: row for name, (row, _) in found.items()}
        print(f"\n{self._title()}")
        print(
            f"peak memory of one training step and its parts, GiB (2^30 bytes)\n\n{table(rows)}\n"
        )
        print("".join(f"{line}\n" for _, line in found.values() if line), end="")
        if self.question.fit_gib:
            print(fit_line(rows, self.question.fit_gib, self.shape.seq_len))
        folder = Path(self.cfg.output_dir)
        write(folder, rows, settings=self._settings(), title=self._title())
        print(f"{folder / JSON_FILE} and {PLOT_FILE} written")

    def _title(self) -> str:
        return (
            f"{self.cfg.model._component_}, {self.shape.batch_size} x {self.shape.seq_len} tokens, "
            f"{DTYPE_NAMES[self.choices.dtype]}, {self.device}"
        )

    def _settings(self) -> dict[str, object]:
        return {
            "model": str(self.cfg.model._component_),
            "batch_size": self.shape.batch_size,
            "seq_len": self.shape.seq_len,
            "dtype": DTYPE_NAMES[self.choices.dtype],
            "device": self.device,
            "attention": self.attention,
            "lora_rank": self.choices.lora_rank,
            "fit_gib": self.question.fit_gib,
            "num_processes": self.question.spread.num_processes,
            "backbone_sharding": self.question.spread.mode,
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


def main(cfg: DictConfig) -> None:
    """Run the recipe."""
    check_config(cfg, KEYS)
    fetch_models(cfg, "config")
    recipe = QSTEstimateRecipe(cfg)
    with output_folder(Path(cfg.output_dir)):
        recipe.run()


if __name__ == "__main__":
    run_recipe(main, KEYS, __doc__)
