"""Estimate memory and cost of a training config before it runs.

Examples::

    tune run qst_estimate --config llama2/7B_qst batch_size=16 tokenizer.max_seq_len=2048
    tune run qst_estimate --config llama3_1/8B_qst tokenizer.max_seq_len=1024 fit_gib=24

Neither weights nor tokenizer, data or GPU are needed: the model and the loss of the config run one
training step on tensors that have shapes but no memory, and every allocation is counted. The same
is done for PEQA and for torchtune's QLoRA, LoRA and full fine-tuning of the same backbone.

Keys beside those of the training config: ``fit_gib`` (which batch fits?), ``methods`` (a list, or
[all]), ``lora_rank``, ``attention`` (fused or plain), ``num_processes`` (that share the work; with
``backbone_sharding=full`` the backbone too).
"""

import warnings
from pathlib import Path

import torch
from omegaconf import DictConfig
from torchtune import utils

from qst_tune.errors import UserError
from qst_tune.estimation.dry_run import DEFAULT_SEQ_LEN
from qst_tune.estimation.fake_device import Attention, DeviceType
from qst_tune.estimation.largest_batch import LargestBatch, largest_batch
from qst_tune.estimation.methods import DEFAULT_METHODS, Choices, Method, choose_methods
from qst_tune.estimation.report import JSON_FILE, PLOT_FILE, Row, fit_line, table, write
from qst_tune.estimation.spread import Spread, spread_line
from qst_tune.estimation.step import Shape, StepCost, estimate_step
from qst_tune.modules import QSTDecoder
from qst_tune.modules.peqa_decoder import PEQADecoder
from qst_tune.training.cli import run_recipe
from qst_tune.training.config_check import check_config
from qst_tune.training.config_keys import TRAINING_OPTIONAL, TRAINING_REQUIRED
from qst_tune.training.hub_models import fetch_models
from qst_tune.training.memory import GIB
from qst_tune.training.output_folder import output_folder

REQUIRED_KEYS = (
    "model",
    "tokenizer",
    "batch_size",
    "optimizer",
    "loss",
    "output_dir",
    "device",
    "dtype",
)
OPTIONAL_KEYS = ("fit_gib", "methods", "lora_rank", "attention", "num_processes")
# Of a training config; most are not read, since no weights, data or loggers are needed.
UNUSED_KEYS = (*TRAINING_REQUIRED, *TRAINING_OPTIONAL)
# Of the batches tried for fit_gib: the time of a trial grows with them (8 s for 7B).
MAX_TRIAL_TOKENS = 65_536

log = utils.get_logger("INFO")


class QSTEstimateRecipe:
    """Estimate each method once, and its largest batch if asked.

    Args:
        cfg (DictConfig): a training config, with our keys beside it.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.device = _device_type(str(cfg.device))
        self.attention = _attention(str(cfg.get("attention", "fused")))
        self.shape = Shape(_positive_int(cfg, "batch_size"), self._seq_len())
        self.fit_gib = _fit_gib(cfg)
        self.methods = choose_methods(list(cfg.get("methods") or DEFAULT_METHODS))
        rank = {"lora_rank": _positive_int(cfg, "lora_rank")} if "lora_rank" in cfg else {}
        self.choices = Choices(cfg, _dtype(str(cfg.dtype)), **rank)
        processes = _positive_int(cfg, "num_processes") if cfg.get("num_processes") else 1
        self.spread = Spread.of_config(cfg, processes)

    def _seq_len(self) -> int:
        if self.cfg.tokenizer.get("max_seq_len") is not None:
            return _positive_int(self.cfg.tokenizer, "max_seq_len")
        log.info(
            f"tokenizer.max_seq_len is null, so rows have the length of the data: "
            f"estimating {DEFAULT_SEQ_LEN} tokens a row"
        )
        return DEFAULT_SEQ_LEN

    def run(self) -> None:
        """Print the table and write it."""
        rows: dict[str, Row] = {}
        lines: list[str] = []
        for name, method in self.methods.items():
            cost = self._cost(method, self.shape)
            batch = self._largest_batch(method) if self.fit_gib else None
            rows[name] = Row(method.title, cost, batch)
            lines += self._spread_lines(name, method, cost)
        print(f"\n{self._title()}")
        print(
            f"peak memory of one training step and its parts, GiB (2^30 bytes)\n\n{table(rows)}\n"
        )
        print("".join(f"{line}\n" for line in lines), end="")
        if self.fit_gib:
            print(fit_line(rows, self.fit_gib, self.shape.seq_len))
        folder = Path(self.cfg.output_dir)
        write(folder, rows, settings=self._settings(), title=self._title())
        print(f"{folder / JSON_FILE} and {PLOT_FILE} written")

    def _cost(self, method: Method, shape: Shape) -> StepCost:
        return estimate_step(
            method, self.choices, shape, device=self.device, attention=self.attention
        )

    def _spread_lines(self, name: str, method: Method, cost: StepCost) -> list[str]:
        """What each of several processes has of it; nothing for one process or others' methods."""
        if self.spread.num_processes == 1:
            return []
        model = method.build(self.choices).model
        if not isinstance(model, QSTDecoder | PEQADecoder):
            return []
        return [f"{name}, {spread_line(self.spread, model, cost.memory.num_bytes)}"]

    def _largest_batch(self, method: Method) -> LargestBatch:
        assert self.fit_gib is not None

        model = method.build(self.choices).model if self.spread.is_sharded else None

        def peak_bytes(batch_size: int) -> int:
            peak = self._cost(method, Shape(batch_size, self.shape.seq_len)).memory.num_bytes
            is_ours = isinstance(model, QSTDecoder | PEQADecoder)
            return self.spread.peak_bytes(model, peak) if is_ours else peak

        return largest_batch(
            peak_bytes,
            self.fit_gib * GIB,
            start=self.shape.batch_size,
            max_trial=MAX_TRIAL_TOKENS // self.shape.seq_len,
        )

    def _title(self) -> str:
        return (
            f"{self.cfg.model._component_}, {self.shape.batch_size} x {self.shape.seq_len} tokens, "
            f"{self.cfg.dtype}, {self.device}"
        )

    def _settings(self) -> dict[str, object]:
        return {
            "model": str(self.cfg.model._component_),
            "batch_size": self.shape.batch_size,
            "seq_len": self.shape.seq_len,
            "dtype": str(self.cfg.dtype),
            "device": self.device,
            "attention": self.attention,
            "lora_rank": self.choices.lora_rank,
            "fit_gib": self.fit_gib,
            "num_processes": self.spread.num_processes,
            "backbone_sharding": self.spread.mode,
        }


def _device_type(device: str) -> DeviceType:
    kind = device.partition(":")[0]
    if kind == "cpu":
        return "cpu"
    if kind == "cuda":
        return "cuda"
    raise UserError(f"device={device} cannot be estimated: use cpu or cuda")


def _attention(attention: str) -> Attention:
    if attention == "fused":
        return "fused"
    if attention == "plain":
        return "plain"
    raise UserError(f"attention={attention} is unknown: use fused or plain")


def _dtype(dtype: str) -> torch.dtype:
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in dtypes:
        raise UserError(f"dtype={dtype} is not supported: use bf16 or fp32")
    return dtypes[dtype]


def _positive_int(block: DictConfig, key: str) -> int:
    value = block[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{key}={value} must be a whole number of at least 1")
    return value


def _fit_gib(cfg: DictConfig) -> float | None:
    value = cfg.get("fit_gib")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UserError(f"fit_gib={value} must be a number of GiB above 0")
    return float(value)


def main(cfg: DictConfig) -> None:
    """Run the recipe.

    Args:
        cfg (DictConfig): the merged config.
    """
    known = [*REQUIRED_KEYS, *OPTIONAL_KEYS, *UNUSED_KEYS]
    check_config(cfg, known=known, required=REQUIRED_KEYS)
    fetch_models(cfg, "config")
    recipe = QSTEstimateRecipe(cfg)
    # Said once by torch of torchtune's own norms, whose weights are bf16 and inputs fp32.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    with output_folder(Path(cfg.output_dir)):
        recipe.run()


if __name__ == "__main__":
    run_recipe(main)
