"""What learns in the study: models of SmolLM2-135M with their trainable parameters.

torchtune's are its own models; to be at their best here, their trained weights are fp32 under
autocast, as ours are, and 4-bit weights are decoded by our table (the same bits as torchao's).
"""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
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
    LORA_RANK,
    default_config,
    model_arguments,
    recomputes_by_default,
)
from benchmarks.peers import add_lora
from qst_tune.backbone.torchtune_loading import load_backbone
from qst_tune.config.components import instantiate
from qst_tune.models import peqa_decoder, qst_decoder, smollm2_135m
from qst_tune.modules.captured_passes import CapturedPasses
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
        rows (int | None): rows that run at a time, their gradients added up; None: all of a batch.
    """

    model: Any
    groups: list[dict[str, Any]]
    rows: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        device: torch.device = self.model.tok_embeddings.weight.device
        return device

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
            tokens (torch.Tensor): ``[B, T]``, on the model's device.

        Returns:
            torch.Tensor: ``[B, T, D]``.
        """
        with torch.autocast(self.device.type, dtype=DTYPE), _without_head(self.model):
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


def _load(model: Any, directory: Path, device: torch.device) -> Any:
    """Fill the frozen weights, quantising those that the model wants quantised."""
    with tempfile.TemporaryDirectory() as unused:  # torchtune makes the output directory of a run
        block = OmegaConf.merge(
            default_config().checkpointer, {"checkpoint_dir": str(directory), "output_dir": unused}
        )
        checkpointer = instantiate(cast(DictConfig, block), "checkpointer")
        if isinstance(model, QSTModel | PEQAModel):
            load_backbone(model, checkpointer, dtype=DTYPE, device=device)
        else:
            weights = checkpointer.load_checkpoint()[training.MODEL_KEY]
            model.load_state_dict(weights, strict=False)
            model.to(device)
    return model


def full(directory: Path, device: torch.device) -> Learner:
    """Train all weights, in fp32: bf16 weights swallow small steps."""
    model = _load(smollm2_135m(), directory, device)
    return Learner(model, [{"params": list(model.parameters()), "weight_decay": 0.0}])


def lora(
    directory: Path,
    device: torch.device,
    *,
    quantize: bool,
    checkpointing: bool = False,
    rows: int | None = None,
    last: int | None = None,
) -> Learner:
    """Train torchtune's LoRA in all layers, or in the last ones alone.

    Args:
        directory (Path): of SmolLM2-135M-Instruct.
        device (torch.device): where it runs.
        quantize (bool): True for QLoRA: the frozen linears are in NF4.
        checkpointing (bool): recompute each layer in backward.
        rows (int | None): as of :class:`Learner`.
        last (int | None): layers that train; no gradient goes deeper.

    Returns:
        Learner: adapters in fp32.
    """
    with training.set_default_dtype(DTYPE):
        model = smollm2_135m()
        add_lora(model, rank=LORA_RANK, quantize=False)
    _load(model, directory, device)
    model.requires_grad_(False)
    adapters = list(get_adapter_params(model.layers[-last:] if last else model).values())
    for parameter in adapters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    if quantize:
        _quantize_lora_linears(model)
    if checkpointing:
        training.set_activation_checkpointing(model, {TransformerSelfAttentionLayer})
    return Learner(model, [{"params": adapters, "weight_decay": WEIGHT_DECAY}], rows)


def _quantize_lora_linears(model: nn.Module) -> None:
    """What ``quantize_base=True`` does, with blocks that fit layers 576 wide; torchao's do not."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.weight = nn.Parameter(quantize_nf4(module.weight.detach()), requires_grad=False)
            module._quantize_base = True


def qst(
    directory: Path,
    device: torch.device,
    *,
    recompute: bool | None = None,
    rows: int | None = None,
    **changes: Any,
) -> Learner:
    """Train a side network, LoRA in the last layers, or both.

    Args:
        directory (Path): of SmolLM2-135M-Instruct.
        device (torch.device): where it runs.
        recompute (bool | None): what backward needs is computed again; None: as the config has it.
        rows (int | None): as of :class:`Learner`.
        **changes (Any): arguments of ``qst_decoder`` that differ from the shipped config.

    Returns:
        Learner: in the product's own parameter groups.
    """
    shipped = {**model_arguments(), "base_quantization": default_config().model.base_quantization}
    with training.set_default_dtype(DTYPE), torch.device("meta"):
        model = qst_decoder(smollm2_135m(), **{**shipped, **changes})
    _load(model, directory, device)
    model.initialize_side(device)
    model.side.recompute = recomputes_by_default() if recompute is None else recompute
    if device.type == "cuda":  # as the recipe does
        model.captured_passes = CapturedPasses()
    model.train()
    return Learner(model, parameter_groups(model.side), rows)


def qst_in_bf16(directory: Path, device: torch.device) -> Learner:
    """Train the default side network with its parameters and the optimizer's state in bf16."""
    learner = qst(directory, device)
    learner.model.side.to(DTYPE)
    return learner


def peqa(directory: Path, device: torch.device, *, bits: int) -> Learner:
    """Train the scales of the layers' integers of so many bits, one a channel."""
    with training.set_default_dtype(DTYPE), torch.device("meta"):
        model = peqa_decoder(smollm2_135m(), bits=bits)
    _load(model, directory, device)
    return Learner(model, [{"params": list(model.task().values()), "weight_decay": 0.0}])
