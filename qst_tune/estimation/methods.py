"""The methods that an estimate compares: QST and its variants, PEQA, and torchtune's own.

A method turns a config of ours into what one training step needs. To add one, write a function like
those below and name it in :data:`METHODS`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, get_args

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import training
from torchtune.config._utils import _get_component_from_path
from torchtune.modules import RMSNorm, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from qst_tune.errors import UserError, did_you_mean
from qst_tune.estimation.fake_device import Attention
from qst_tune.estimation.peers import add_lora, plain_backbone
from qst_tune.models import peqa_decoder, qst_decoder
from qst_tune.modules.downsample import DownsampleKind
from qst_tune.modules.peqa_decoder import PEQADecoder
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.modules.qst_model import QSTModel
from qst_tune.training.cli import instantiate
from qst_tune.training.loss import connect_loss
from qst_tune.training.model_setup import build_any_on_meta
from qst_tune.training.parameter_groups import parameter_groups

ModelT = TypeVar("ModelT", QSTModel, PEQADecoder)


@dataclass
class Setup:
    """What one training step needs, on the meta device.

    Args:
        model (TransformerDecoder): built, connected to the loss.
        loss (Any): as :func:`~qst_tune.training.loss.next_token_loss` takes it.
        trainable (Callable[[], Any]): the optimizer's parameters or groups, once the model has
            its final tensors.
        attention (Attention | None): overrides the one asked for.
    """

    model: TransformerDecoder
    loss: Any
    trainable: Callable[[], Any]
    attention: Attention | None = None


@dataclass(frozen=True)
class Choices:
    """What the comparison fixes beside the config.

    Args:
        cfg (DictConfig): a training config of ours.
        dtype (torch.dtype): of the backbone.
        lora_rank (int): rank of LoRA and QLoRA, on all linears of a layer.
    """

    cfg: DictConfig
    dtype: torch.dtype
    lora_rank: int = 16


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        title (str): for people.
        build (Callable[[Choices], Setup]): makes the step.
    """

    title: str
    build: Callable[[Choices], Setup]


def _qst(choices: Choices, *, recompute: bool | None = None, **changes: Any) -> Setup:
    """As recipes/qst_finetune.py sets it up; ``changes`` are arguments of the model block."""
    model = _own_model(choices, QSTModel, **changes)
    if model is None:
        model = qst_decoder(_backbone(choices), **changes)
    _keep_norms_in_fp32(model)
    if recompute is None:
        recompute = bool(choices.cfg.get("enable_activation_checkpointing", False))
    model.side.recompute = recompute
    loss = instantiate(choices.cfg.loss, "loss")
    connect_loss(loss, model)
    return Setup(model, loss, lambda: parameter_groups(model.side))


def _qst_published(choices: Choices) -> Setup:
    """The paper's equations as its authors ran them: nothing is recomputed, all logits are held.

    Of the config only the backbone counts: what it chooses for its side network is not published.
    """
    parameters = inspect.signature(qst_decoder).parameters.values()
    settings = {p.name: p.default for p in parameters if p.default is not p.empty}
    return _published(_qst(choices, recompute=False, **{**settings, "variant": "paper"}))


def _published(setup: Setup) -> Setup:
    """Full logits and plain attention."""
    setup.model.skip_output_layer = False
    setup.model.num_output_chunks = 0
    setup.loss = nn.CrossEntropyLoss()
    setup.attention = "plain"
    return setup


def _lora(choices: Choices, *, quantize: bool, checkpointing: bool) -> Setup:
    """As torchtune's lora_finetune_single_device recipe sets it up."""
    backbone = _backbone(choices)
    with training.set_default_dtype(choices.dtype), torch.device("meta"):
        add_lora(backbone, rank=choices.lora_rank, quantize=quantize)
    set_trainable_params(backbone, get_adapter_params(backbone))
    return _torchtune_setup(backbone, checkpointing=checkpointing)


def _qlora_published(choices: Choices) -> Setup:
    return _published(_lora(choices, quantize=True, checkpointing=False))


def _full(choices: Choices, *, checkpointing: bool) -> Setup:
    """As torchtune's full_finetune_single_device recipe: weights and states all in one dtype."""
    return _torchtune_setup(_backbone(choices), checkpointing=checkpointing)


def _torchtune_setup(model: TransformerDecoder, *, checkpointing: bool) -> Setup:
    if checkpointing:
        policy = {TransformerSelfAttentionLayer}
        training.set_activation_checkpointing(model, auto_wrap_policy=policy)
    loss = CEWithChunkedOutputLoss()  # what torchtune's configs name
    model.set_num_output_chunks(loss.num_output_chunks)
    return Setup(model, loss, lambda: [p for p in model.parameters() if p.requires_grad])


def _peqa(choices: Choices, *, checkpointing: bool) -> Setup:
    """As recipes/peqa_finetune.py sets it up; at 4 bits per channel for another method's config."""
    model = _own_model(choices, PEQADecoder)
    if model is None:
        model = peqa_decoder(_backbone(choices))
    _keep_norms_in_fp32(model)
    if checkpointing:
        policy = {TransformerSelfAttentionLayer}
        training.set_activation_checkpointing(model, auto_wrap_policy=policy)
    loss = instantiate(choices.cfg.loss, "loss")
    connect_loss(loss, model)
    return Setup(model, loss, lambda: list(model.task().values()))


def _backbone(choices: Choices) -> TransformerDecoder:
    """The backbone of the config's model as torchtune would build it, all of it trainable."""
    with training.set_default_dtype(choices.dtype), torch.device("meta"):
        return plain_backbone(choices.cfg.model)


def _own_model(choices: Choices, model_type: type[ModelT], **changes: Any) -> ModelT | None:
    """The config's model if it is of the type, with changed arguments."""
    cfg = choices.cfg
    expected = inspect.signature(_get_component_from_path(cfg.model._component_)).return_annotation
    if expected is QSTClassifier:
        raise UserError(
            f"model: {cfg.model._component_} is a classifier, and the estimate knows language "
            "models only; take a config of the same backbone for those, such as smollm2/135M_qst"
        )
    if expected is not model_type:
        return None
    built: ModelT = build_any_on_meta(_with_model(cfg, **changes), choices.dtype)
    return built


def _keep_norms_in_fp32(model: nn.Module) -> None:
    """As loading a checkpoint does (training/backbone_loading.py)."""
    for module in list(model.modules()):
        if isinstance(module, RMSNorm):
            scale = module.scale
            module.scale = nn.Parameter(scale.float(), requires_grad=scale.requires_grad)


def _with_model(cfg: DictConfig, **changes: Any) -> DictConfig:
    merged = OmegaConf.merge(cfg, {"model": changes})
    assert isinstance(merged, DictConfig)
    return merged


METHODS: dict[str, Method] = {
    "qst": Method("QST", _qst),
    "qst_stored": Method("QST, nothing recomputed", partial(_qst, recompute=False)),
    "qst_recomputed": Method("QST, side recomputed", partial(_qst, recompute=True)),
    **{
        f"qst_{kind}": Method(
            f"QST, side recomputed, {kind}", partial(_qst, recompute=True, downsample=kind)
        )
        for kind in get_args(DownsampleKind)
    },
    "qst_published": Method("QST, as published", _qst_published),
    "peqa": Method("PEQA", partial(_peqa, checkpointing=False)),
    "peqa_checkpointed": Method("PEQA, checkpointed", partial(_peqa, checkpointing=True)),
    "qlora": Method("QLoRA", partial(_lora, quantize=True, checkpointing=False)),
    "qlora_checkpointed": Method(
        "QLoRA, checkpointed", partial(_lora, quantize=True, checkpointing=True)
    ),
    "qlora_published": Method("QLoRA, as published", _qlora_published),
    "lora": Method("LoRA", partial(_lora, quantize=False, checkpointing=False)),
    "lora_checkpointed": Method(
        "LoRA, checkpointed", partial(_lora, quantize=False, checkpointing=True)
    ),
    "full": Method("full fine-tuning", partial(_full, checkpointing=False)),
    "full_checkpointed": Method("full, checkpointed", partial(_full, checkpointing=True)),
}

# What is shown unless the config says otherwise; each takes 1 to 4 s for a 7B model on one core.
DEFAULT_METHODS = (
    "qst",
    "qst_stored",
    "qst_avgpool",
    "peqa",
    "peqa_checkpointed",
    "qlora",
    "qlora_checkpointed",
    "lora",
    "full",
)


def choose_methods(names: Sequence[str]) -> dict[str, Method]:
    """Look methods up.

    Args:
        names (Sequence[str]): keys of :data:`METHODS`, or "all" alone.

    Returns:
        dict[str, Method]: in the order asked for.

    Raises:
        UserError: if one is unknown.
    """
    if list(names) == ["all"]:
        return METHODS
    for name in names:
        if name not in METHODS:
            known = f"all, {', '.join(METHODS)}"
            raise UserError(
                f"methods: {name!r} is unknown{did_you_mean(name, METHODS)}; choose from {known}"
            )
    if not names:
        raise UserError(f"methods is empty; choose from all, {', '.join(METHODS)}")
    return {name: METHODS[name] for name in names}
