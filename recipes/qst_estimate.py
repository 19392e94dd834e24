"""Estimate memory and cost of a training config before it runs.

Examples::

    tune run qst_estimate --config llama2/7B_qst batch_size=16 tokenizer.max_seq_len=2048
    tune run qst_estimate --config llama3_1/8B_qst tokenizer.max_seq_len=1024 fit_gib=24

Neither weights nor tokenizer, data or GPU are needed: the model and the loss of the config run one
training step on tensors that have shapes but no memory, and every allocation is counted. Of a model
on the hub only ``config.json`` is downloaded. ``python -m benchmarks.estimate`` puts torchtune's
QLoRA, LoRA and full fine-tuning beside it.
"""

import torch
from omegaconf import DictConfig
from torchtune import utils

from qst_tune.config.check import read_config, read_trials
from qst_tune.config.cli import run_recipe
from qst_tune.config.device import AUTO, DTYPE_NAMES
from qst_tune.config.model_directory import fetch_models
from qst_tune.config.schema import EstimateConfig
from qst_tune.errors import UserError
from qst_tune.estimation.depths import Depths, depths_of
from qst_tune.estimation.estimate import (
    DEFAULT_SEQ_LEN,
    JSON_FILE,
    EstimateRequest,
    Row,
    batch_text,
    table,
    write,
)
from qst_tune.estimation.fake_device import DeviceType
from qst_tune.estimation.spread import Spread
from qst_tune.estimation.step import Shape, own_setup
from qst_tune.estimation.trials import TrialsCost, trials_cost
from qst_tune.results.output_directory import output_directory

log = utils.get_logger("INFO")


def request_of(cfg: EstimateConfig) -> EstimateRequest:
    """Return what the config asks: about a step of its model, and the batch that fits."""
    dtype = dtype_of(cfg.dtype)
    return EstimateRequest(
        lambda: own_setup(cfg, dtype),
        cfg,
        Shape(cfg.batch_size, row_length(cfg)),
        device=device_type(cfg.device),
        attention=cfg.attention,
        spread=Spread.of_config(cfg, cfg.num_processes),
        fit_gib=cfg.fit_gib,
    )


def row_length(cfg: EstimateConfig) -> int:
    """Return ``tokenizer.max_seq_len``, or a length that is said where it is null."""
    length = cfg.tokenizer.get("max_seq_len")
    if length is None:
        log.info(
            f"tokenizer.max_seq_len is null, so rows have the length of the data: "
            f"estimating {DEFAULT_SEQ_LEN} tokens a row"
        )
        return DEFAULT_SEQ_LEN
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise UserError(f"tokenizer.max_seq_len={length} must be a whole number of at least 1")
    return length


def device_type(device: str) -> DeviceType:
    """Return the kind of a device; auto is a GPU to come, whatever this machine has."""
    kind = device.partition(":")[0]
    if kind == "cpu":
        return "cpu"
    if kind in ("cuda", AUTO):
        return "cuda"
    raise UserError(f"device={device} cannot be estimated: use cpu or cuda")


def dtype_of(dtype: str) -> torch.dtype:
    """Return the dtype of a name; auto is bf16, which a GPU to come has."""
    dtypes = {AUTO: torch.bfloat16, **{name: dtype for dtype, name in DTYPE_NAMES.items()}}
    if dtype not in dtypes:
        raise UserError(f"dtype={dtype} is not supported: use bf16, fp16 or fp32")
    return dtypes[dtype]


def depths_asked(cfg: EstimateConfig, asked: EstimateRequest) -> Depths | None:
    """Return the prices of every ``lora_layers``, unless the config does without."""
    dtype = dtype_of(cfg.dtype)
    return depths_of(asked, lambda k: own_setup(cfg, dtype, k)) if cfg.depths else None


def trials_asked(cfg: EstimateConfig, asked: EstimateRequest) -> TrialsCost | None:
    """Return what the config's trials cost, if it has any."""
    trials = read_trials(cfg)
    if not trials.configs:
        return None
    dtype = dtype_of(cfg.dtype)
    return trials_cost(trials.configs, dtype, asked.shape, asked.device, asked.attention)


def report(
    cfg: EstimateConfig,
    asked: EstimateRequest,
    row: Row,
    spread: str | None,
    depths: Depths | None,
    trials: TrialsCost | None = None,
) -> str:
    """Write the answer as text: the table, and a line for each further question."""
    batch_size, seq_len = asked.shape.batch_size, asked.shape.seq_len
    lines = [
        f"\n{cfg.model._component_}, {batch_size} x {seq_len} tokens, "
        f"{DTYPE_NAMES[dtype_of(cfg.dtype)]}, {asked.device}",
        f"peak memory of one training step and its parts, GiB (2^30 bytes)\n\n{table([row])}\n",
    ]
    if spread:
        lines.append(spread)
    if depths:
        lines.append(f"{depths.table()}\n")
    if trials:
        lines.append(trials.line(asked.fit_gib))
    if asked.fit_gib:
        lines.append(
            f"largest batch of {seq_len} tokens a row that fits in {asked.fit_gib:g} GiB: "
            f"{batch_text(row.largest_batch, row.at_once)}"
        )
        if depths:
            lines.append(depths.report())
    return "\n".join(lines)


def settings_of(cfg: EstimateConfig, asked: EstimateRequest) -> dict[str, object]:
    """Return what the figures are for, as estimate.json has it."""
    return {
        "model": str(cfg.model._component_),
        "batch_size": asked.shape.batch_size,
        "seq_len": asked.shape.seq_len,
        "dtype": DTYPE_NAMES[dtype_of(cfg.dtype)],
        "device": asked.device,
        "attention": asked.attention,
        "fit_gib": asked.fit_gib,
        "num_processes": asked.spread.num_processes,
        "backbone_sharding": asked.spread.mode,
    }


def main(raw: DictConfig) -> None:
    """Run the recipe."""
    cfg = fetch_models(read_config(raw, EstimateConfig), "config")
    asked = request_of(cfg)
    with output_directory(cfg.output_dir) as directory:
        (row, spread), depths = asked.answer(), depths_asked(cfg, asked)
        trials = trials_asked(cfg, asked)
        print(report(cfg, asked, row, spread, depths, trials))
        more = {**(depths.figures() if depths else {}), **(trials.figures() if trials else {})}
        write(directory, row, settings_of(cfg, asked), more)
    print(f"{directory / JSON_FILE} written")


if __name__ == "__main__":
    run_recipe(main, EstimateConfig, __doc__)
