"""The methods of the study, each a model of SmolLM2-135M with its trainable parameters.

torchtune's are its own models; to be at their best here, their trained weights are fp32 under
autocast, as ours are, and 4-bit weights are decoded by our table (the same bits as torchao's).
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.peft import LoRALinear, get_adapter_params

from benchmarks.backbones import DTYPE
from benchmarks.methods import (
    CPU,
    LORA_RANK,
    default_config,
    model_arguments,
    recomputes_by_default,
)
from benchmarks.peers import add_lora
from qst_tune.backbone.torchtune_loading import load_backbone
from qst_tune.config.components import instantiate
from qst_tune.models import peqa_decoder, qst_decoder, smollm2_135m
from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.modules.qst_model import QSTModel
from qst_tune.quantization.nf4 import dequantize_nf4, quantize_nf4
from qst_tune.training.methods import parameter_groups

WEIGHT_DECAY = 0.01


@dataclass
class Learner:
    """A model and what trains of it.

    Args:
        model (Any): a torchtune decoder.
        groups (list[dict[str, Any]]): for the optimizer.
    """

    model: Any
    groups: list[dict[str, Any]]

    @property
    def trained(self) -> list[torch.Tensor]:
        """The trained parameters."""
        return [p for group in self.groups for p in group["params"]]

    @property
    def num_trained(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.trained)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run everything but the LM head.

        Args:
            tokens (torch.Tensor): ``[B, T]``.

        Returns:
            torch.Tensor: ``[B, T, D]``.
        """
        with torch.autocast("cpu", dtype=DTYPE), _without_head(self.model):
            hidden: torch.Tensor = self.model(tokens)
        return hidden


def fast_decoding() -> AbstractContextManager[Any]:
    """Decode torchtune's 4-bit weights by our table too, forward and backward: the same bits.

    Returns:
        AbstractContextManager[Any]: for the whole run.
    """
    return mock.patch.object(NF4Tensor, "get_original_weight", dequantize_nf4)


@contextmanager
def _without_head(model: Any) -> Iterator[None]:
    """Take the tied head, which is no module, off for a moment: torchtune has no switch for it."""
    head, model.output = model.output, lambda hidden: hidden
    try:
        yield
    finally:
        model.output = head


def _load(model: Any, directory: Path) -> Any:
    """Fill the frozen weights, quantising those that the model wants quantised."""
    with tempfile.TemporaryDirectory() as unused:  # torchtune makes the output directory of a run
        block = OmegaConf.merge(
            default_config().checkpointer, {"checkpoint_dir": str(directory), "output_dir": unused}
        )
        checkpointer = instantiate(cast(DictConfig, block), "checkpointer")
        if isinstance(model, QSTModel | PEQAModel):
            load_backbone(model, checkpointer, dtype=DTYPE, device=CPU)
        else:
            weights = checkpointer.load_checkpoint()[training.MODEL_KEY]
            model.load_state_dict(weights, strict=False)
    return model


def _full(directory: Path) -> Learner:
    model = _load(smollm2_135m(), directory)  # fp32: bf16 weights swallow small steps
    return Learner(model, [{"params": list(model.parameters()), "weight_decay": 0.0}])


def _lora(
    directory: Path, *, quantize: bool, checkpointing: bool = False, last: int | None = None
) -> Learner:
    """LoRA in all layers, or in the last ones alone, so that no gradient goes deeper."""
    with training.set_default_dtype(DTYPE):
        model = smollm2_135m()
        add_lora(model, rank=LORA_RANK, quantize=False)
    _load(model, directory)
    model.requires_grad_(False)
    adapters = list(get_adapter_params(model.layers[-last:] if last else model).values())
    for parameter in adapters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    if quantize:
        _quantize_lora_linears(model)
    if checkpointing:
        training.set_activation_checkpointing(model, {TransformerSelfAttentionLayer})
    return Learner(model, [{"params": adapters, "weight_decay": WEIGHT_DECAY}])


def _quantize_lora_linears(model: nn.Module) -> None:
    """What ``quantize_base=True`` does, with blocks that fit layers 576 wide; torchao's do not."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.weight = nn.Parameter(quantize_nf4(module.weight.detach()), requires_grad=False)
            module._quantize_base = True


def _qst(directory: Path, changes: dict[str, Any]) -> Learner:
    shipped = {**model_arguments(), "base_quantization": default_config().model.base_quantization}
    with training.set_default_dtype(DTYPE), torch.device("meta"):
        model = qst_decoder(smollm2_135m(), **{**shipped, **changes})
    _load(model, directory)
    model.initialize_side(CPU)
    model.side.recompute = recomputes_by_default()
    model.train()
    return Learner(model, parameter_groups(model.side))


def _qst_in_bf16(directory: Path) -> Learner:
    """Trained parameters and their optimizer's state in bf16, not fp32."""
    learner = _qst(directory, {})
    learner.model.side.to(DTYPE)
    return learner


def _peqa(directory: Path, *, bits: int) -> Learner:
    with training.set_default_dtype(DTYPE), torch.device("meta"):
        model = peqa_decoder(smollm2_135m(), bits=bits)
    _load(model, directory)
    return Learner(model, [{"params": list(model.task().values()), "weight_decay": 0.0}])


# The best of those tried with seed 0 (results/study.jsonl has all), on the same held-out rows.
FULL_RATES = {"wikitext2": 3e-4}
LORA_RATES = {"wikitext2": 3e-3}
QST_RATES = {"sst2": 1e-3, "rte": 1e-3, "wikitext2": 1e-2}
QST_WIDE_RATES = {"sst2": 1e-3, "rte": 1e-3, "alpaca": 1e-3, "alpaca_chat": 1e-3}


@dataclass(frozen=True)
class Method:
    """One line of the tables.

    Args:
        title (str): for people.
        build (Callable[[Path], Learner]): from the directory of SmolLM2-135M-Instruct.
        rates (dict[str, float]): learning rates that differ from :attr:`rate`, by task.
        rate (float): learning rate where ``--rates`` gives none.
    """

    title: str
    build: Callable[[Path], Learner]
    rate: float
    rates: dict[str, float] = field(default_factory=dict)


def qst(title: str, rates: dict[str, float] = QST_RATES, **changes: Any) -> Method:
    """Describe a variant of ours.

    Args:
        title (str): for people.
        rates (dict[str, float]): learning rates by task.
        **changes (Any): arguments of ``qst_decoder`` that differ from the shipped config.

    Returns:
        Method: a line of the tables.
    """
    return Method(title, partial(_qst, changes=changes), 3e-3, rates)


METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", _full, 1e-4, FULL_RATES),
    "lora": Method("LoRA, rank 16", partial(_lora, quantize=False), 1e-3, LORA_RATES),
    "lora_last_6": Method(
        "LoRA in the last 6 of 30 layers", partial(_lora, quantize=False, last=6), 1e-3, LORA_RATES
    ),
    "lora_last_15": Method(
        "LoRA in the last 15 of 30 layers",
        partial(_lora, quantize=False, last=15),
        1e-3,
        LORA_RATES,
    ),
    "qlora": Method("QLoRA, rank 16", partial(_lora, quantize=True), 1e-3, LORA_RATES),
    "qlora_checkpointed": Method(
        "QLoRA, rank 16, checkpointed",
        partial(_lora, quantize=True, checkpointing=True),
        1e-3,
        LORA_RATES,
    ),
    "qst": qst("QST"),
    "qst_nf4": qst("QST over NF4", base_quantization="nf4"),
    **{
        f"qst_nf4_rank_{rank}": qst(
            f"QST over NF4, repaired with rank {rank}", base_quantization="nf4", repair_rank=rank
        )
        for rank in (16, 32, 64)
    },
    "peqa": Method("PEQA, 4 bits, per channel", partial(_peqa, bits=4), 3e-3),
    "lst": qst("LST: QST over the unquantised model", base_quantization="none"),
    "qst_r32": qst("QST, r = 32", reduction_factor=32),
    "qst_r8": qst("QST, r = 8", reduction_factor=8),
    "qst_r4": qst("QST, r = 4", QST_WIDE_RATES, reduction_factor=4),
    "qst_paper": qst("QST, the paper's equations", variant="paper"),
    "qst_authors": qst("QST, the authors' code", variant="authors"),
    # One change of the default each.
    "blocks_3": qst("QST, 3 side blocks", num_side_blocks=3),
    "blocks_10": qst("QST, 10 side blocks", num_side_blocks=10),
    "blocks_30": qst("QST, a side block for every layer", num_side_blocks=30),
    "unnormalised": qst("QST, hidden states read as they are", normalize_hidden=False),
    "linear": qst("QST, linear downsamplers", downsample="linear"),
    "lora_down": qst("QST, LoRA downsamplers", downsample="lora"),
    "maxpool": qst("QST, max pooling", downsample="maxpool"),
    "avgpool": qst("QST, average pooling", downsample="avgpool"),
    "rank_4": qst("QST, downsamplers of rank 4", rank=4),
    "rank_64": qst("QST, downsamplers of rank 64", rank=64),
    "channel_gates": qst("QST, a gate for every channel", gate_per_channel=True),
    "alpha_mix": qst("QST, the paper's output mix", output_mix="alpha"),
    "sigmoid_mix": qst("QST, the authors' output mix", output_mix="sigmoid"),
    "heads_4": qst("QST, side heads 4 wide", min_head_dim=4),
    "heads_12": qst("QST, side heads 12 wide", min_head_dim=12),
    "bf16": Method("QST, trained in bf16", _qst_in_bf16, 3e-3, QST_RATES),
    "fp4": qst("QST over FP4", base_quantization="fp4"),
}
