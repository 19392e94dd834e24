"""Estimated memory of a config's model beside torchtune's own methods over the same backbone.

    python -m benchmarks.estimate --config llama2/7B_qst batch_size=16 tokenizer.max_seq_len=2048

prints the tables of docs/estimation.md; ``--methods`` chooses the rows. Each is what
``tune run qst_estimate`` says of one method: the config's own model and variants of it, and
torchtune's LoRA, QLoRA and full fine-tuning with its own modules, losses and checkpointing.
"""

import argparse
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import training
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from benchmarks.peers import add_lora, plain_backbone
from qst_tune.config.file import parse_config
from qst_tune.config.keys import typed
from qst_tune.config.schema import EstimateConfig, StepConfig
from qst_tune.errors import UserError
from qst_tune.estimation.estimate import EstimateRequest, Row, batch_text, table
from qst_tune.estimation.fake_device import DeviceType
from qst_tune.estimation.step import Setup, Shape, peqa_setup, qst_setup
from qst_tune.models import peqa_decoder, qst_decoder
from qst_tune.models.build import build_any_on_meta
from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.modules.qst_model import QSTModel
from qst_tune.torchtune_compat import component_of
from qst_tune.training.language_modelling import NextTokenTask

CONFIGS = Path(__file__).parent.parent / "configs"
DTYPE = torch.bfloat16
LORA_RANK = 16  # on all linears of a layer


def qst(cfg: StepConfig, *, recompute: bool | None = None, **changes: Any) -> Setup:
    """As recipes/qst_finetune.py sets it up; ``changes`` are arguments of the model block."""
    model = build_any_on_meta(_changed(cfg.model, changes), DTYPE) if _is(cfg, QSTModel) else None
    if model is None:
        model = qst_decoder(_backbone(cfg), **changes)
    if recompute is None:
        recompute = cfg.enable_activation_checkpointing
    return qst_setup(cfg, model, DTYPE, recompute=recompute)


def peqa(cfg: StepConfig, *, checkpointing: bool) -> Setup:
    """As recipes/peqa_finetune.py sets it up; at 4 bits per channel for another method's config."""
    model = (
        build_any_on_meta(cfg.model, DTYPE) if _is(cfg, PEQAModel) else peqa_decoder(_backbone(cfg))
    )
    return peqa_setup(cfg, model, DTYPE, checkpointing=checkpointing)


def lora(cfg: StepConfig, *, quantize: bool, checkpointing: bool) -> Setup:
    """As torchtune's lora_finetune_single_device recipe sets it up."""
    backbone = _backbone(cfg)
    with training.set_default_dtype(DTYPE), torch.device("meta"):
        add_lora(backbone, rank=LORA_RANK, quantize=quantize)
    set_trainable_params(backbone, get_adapter_params(backbone))
    return torchtune_setup(backbone, checkpointing=checkpointing)


def full(cfg: StepConfig, *, checkpointing: bool) -> Setup:
    """As torchtune's full_finetune_single_device recipe: weights and states all in one dtype."""
    return torchtune_setup(_backbone(cfg), checkpointing=checkpointing)


def torchtune_setup(model: TransformerDecoder, *, checkpointing: bool) -> Setup:
    """A step of what trains of a torchtune decoder."""
    if checkpointing:
        policy = {TransformerSelfAttentionLayer}
        training.set_activation_checkpointing(model, auto_wrap_policy=policy)
    loss = CEWithChunkedOutputLoss()  # what torchtune's configs name
    model.set_num_output_chunks(loss.num_output_chunks)
    task = NextTokenTask(loss, torch.device("cpu"))
    return Setup("", model, task, lambda: [p for p in model.parameters() if p.requires_grad], DTYPE)


def qst_published(cfg: StepConfig) -> Setup:
    """The paper's equations as its authors ran them: nothing is recomputed, all logits are held.

    Of the config only the backbone counts: what it chooses for its side network is not published.
    """
    parameters = inspect.signature(qst_decoder).parameters.values()
    settings = {p.name: p.default for p in parameters if p.default is not p.empty}
    return _published(qst(cfg, recompute=False, **{**settings, "variant": "paper"}))


def qlora_published(cfg: StepConfig) -> Setup:
    """QLoRA with full logits and plain attention, as the paper compares with."""
    return _published(lora(cfg, quantize=True, checkpointing=False))


def _published(setup: Setup) -> Setup:
    setup.model.skip_output_layer = False
    setup.model.num_output_chunks = 0
    setup.task = NextTokenTask(nn.CrossEntropyLoss(), torch.device("cpu"))
    setup.attention = "plain"
    return setup


def _backbone(cfg: StepConfig) -> TransformerDecoder:
    """The backbone of the config's model as torchtune would build it, all of it trainable."""
    with training.set_default_dtype(DTYPE), torch.device("meta"):
        return plain_backbone(cfg.model)


def _is(cfg: StepConfig, model_type: type) -> bool:
    builder = component_of(cfg.model._component_)
    return inspect.signature(builder).return_annotation is model_type


def _changed(block: DictConfig, changes: dict[str, Any]) -> DictConfig:
    merged = OmegaConf.merge(block, changes)
    assert isinstance(merged, DictConfig)
    return merged


METHODS: dict[str, Callable[[StepConfig], Setup]] = {
    "qst": qst,
    "qst_stored": partial(qst, recompute=False),
    "qst_recomputed": partial(qst, recompute=True),
    "qst_avgpool": partial(qst, recompute=True, downsample="avgpool"),
    "qst_published": qst_published,
    "peqa": partial(peqa, checkpointing=False),
    "peqa_checkpointed": partial(peqa, checkpointing=True),
    "qlora": partial(lora, quantize=True, checkpointing=False),
    "qlora_checkpointed": partial(lora, quantize=True, checkpointing=True),
    "qlora_published": qlora_published,
    "lora": partial(lora, quantize=False, checkpointing=False),
    "lora_checkpointed": partial(lora, quantize=False, checkpointing=True),
    "full": partial(full, checkpointing=False),
    "full_checkpointed": partial(full, checkpointing=True),
}
# The columns of docs/estimation.md.
SHOWN = "qst,qst_stored,qst_avgpool,qlora_checkpointed,qlora,lora,full"


def row(
    name: str, cfg: StepConfig, shape: Shape, device: DeviceType, fit_gib: float | None = None
) -> Row:
    """Estimate one method."""
    request = EstimateRequest(partial(METHODS[name], cfg), cfg, shape, device, fit_gib=fit_gib)
    found, _ = request.answer()
    return replace(found, title=name)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit status 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate", description=__doc__)
    parser.add_argument("--config", default="llama2/7B_qst", help="a training config")
    parser.add_argument("--methods", default=SHOWN, help=f"some of {','.join(METHODS)}")
    parser.add_argument("--fit-gib", type=float, help="look for the largest batch within it")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("overrides", nargs="*", help="of the config, such as batch_size=16")
    asked = parser.parse_args(arguments)
    try:
        names = asked.methods.split(",")
        unknown = [name for name in names if name not in METHODS]
        if unknown:
            raise UserError(f"--methods: {unknown[0]!r} is unknown; known: {', '.join(METHODS)}")
        shipped = CONFIGS / f"{asked.config}.yaml"
        path = str(shipped if shipped.is_file() else asked.config)
        cfg = typed(parse_config(["--config", path, *asked.overrides]), EstimateConfig)
        shape = Shape(cfg.batch_size, cfg.tokenizer.max_seq_len or 512)
        rows = [row(name, cfg, shape, asked.device, asked.fit_gib) for name in names]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{asked.config}, {shape.batch_size} x {shape.seq_len} tokens, bf16, GiB (2^30 bytes)")
    print(table(rows))
    if asked.fit_gib:
        fits = ", ".join(
            f"{row.title} {batch_text(row.largest_batch, row.at_once)}" for row in rows
        )
        print(f"largest batch that fits in {asked.fit_gib:g} GiB: {fits}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
