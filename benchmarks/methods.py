"""The methods that are compared, each ready to take training steps.

torchtune's are its own models, losses and settings, unmodified, and once more with two slow paths
on a CPU taken away; ours is what the recipe ``qst_finetune`` sets up from the config
:data:`CONFIG`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast
from unittest import mock

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import AdamW, Optimizer
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from benchmarks.backbones import BACKBONES, DTYPE, Backbone, dense_backbone
from qst_tune.backbone.torchtune_loading import load_backbone
from qst_tune.config.components import instantiate
from qst_tune.data.batches.collate import align_labels
from qst_tune.models import qst_decoder, smollm2_135m
from qst_tune.modules.loss import connect_loss, next_token_loss
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.config import VARIANTS
from qst_tune.quantization.nf4 import dequantize_nf4
from qst_tune.training.methods import parameter_groups

CONFIG = Path(__file__).parent.parent / "configs" / "smollm2" / "135M_qst.yaml"
SMOLLM2 = "smollm2"
LORA_RANK = 16
CPU = torch.device("cpu")
Batch = dict[str, torch.Tensor]


@dataclass
class Trainee:
    """A model with all that a training step needs.

    Args:
        model (nn.Module): connected to the loss.
        loss (Any): as :func:`~qst_tune.modules.loss.next_token_loss` takes it.
        optimizer (Optimizer): over the trainable parameters.
        clip_grad_norm (float | None): largest norm of the gradient.
    """

    model: nn.Module
    loss: Any
    optimizer: Optimizer
    clip_grad_norm: float | None = None

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def step(self, batch: Batch) -> float:
        """Take one training step, as our recipe and torchtune's do it.

        Args:
            batch (Batch): ``tokens`` and ``labels``, ``[B, T]``.

        Returns:
            float: the loss before the step, nats a token.
        """
        loss, num_labels = next_token_loss(self.model, self.loss, batch)
        return self.descend(loss * num_labels, num_labels)

    def descend(self, loss: torch.Tensor, count: torch.Tensor | int) -> float:
        """Take the step that a loss asks for.

        Args:
            loss (torch.Tensor): sum over all labels.
            count (torch.Tensor | int): number of labels.

        Returns:
            float: the mean loss.
        """
        loss.backward()
        training.scale_grads(self.model, 1 / count)
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, self.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach() / count)


def random_batch(backbone: Backbone, batch_size: int, num_tokens: int, seed: int) -> Batch:
    """Draw a batch in which every token has a label.

    Args:
        backbone (Backbone): its vocabulary counts.
        batch_size (int): rows.
        num_tokens (int): tokens a row.
        seed (int): the same seed gives the same batch.

    Returns:
        Batch: ``tokens`` and ``labels``.
    """
    generator = torch.Generator().manual_seed(seed)
    size = (batch_size, num_tokens)
    tokens = torch.randint(backbone.vocab_size, size, generator=generator)
    return {"tokens": tokens, "labels": align_labels(tokens)}


@cache
def default_config() -> DictConfig:
    """Read the config that our method is set up from.

    Returns:
        DictConfig: of a ``qst_finetune`` run.
    """
    return cast(DictConfig, OmegaConf.load(CONFIG))


# torchtune's methods. Its configs name these losses and optimizers, and do not clip.


def _full(backbone: Backbone) -> Trainee:
    return _torchtune_trainee(dense_backbone(backbone))


def _lora(backbone: Backbone, *, quantize: bool = False, checkpointing: bool = False) -> Trainee:
    weights = dense_backbone(backbone).state_dict()
    with training.set_default_dtype(DTYPE):
        model = lora_llama3_2(
            ["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            lora_rank=LORA_RANK,
            lora_alpha=2 * LORA_RANK,
            quantize_base=quantize,
            **backbone.builder_arguments(),
        )
    model.load_state_dict(weights, strict=False)
    set_trainable_params(model, get_adapter_params(model))
    if checkpointing:
        policy = {TransformerSelfAttentionLayer}
        training.set_activation_checkpointing(model, auto_wrap_policy=policy)
    return _torchtune_trainee(model)


def _torchtune_trainee(model: Any) -> Trainee:
    loss = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss.num_output_chunks)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Trainee(model, loss, AdamW(trained, fused=True))


# Ours.


@dataclass
class _InMemoryCheckpointer:
    """What ``load_backbone`` asks of a torchtune checkpointer."""

    weights: dict[str, torch.Tensor]

    def load_checkpoint(self) -> dict[str, dict[str, torch.Tensor]]:
        return {training.MODEL_KEY: self.weights}


def _qst(backbone: Backbone, **changes: Any) -> Trainee:
    """As recipes/qst_finetune.py sets it up; ``changes`` are keys of the config's model block."""
    with training.set_default_dtype(DTYPE), torch.device("meta"):
        model = qst_decoder(
            llama3_2(**backbone.builder_arguments()), **{**model_arguments(), **changes}
        )
    load_random_backbone(model, backbone)
    return qst_trainee(model)


def load_random_backbone(model: QSTModel, backbone: Backbone) -> None:
    """Fill a model on the meta device with the weights that all methods start from.

    Args:
        model (QSTModel): its backbone is filled.
        backbone (Backbone): its sizes.
    """
    weights = dense_backbone(backbone).state_dict()
    load_backbone(model, _InMemoryCheckpointer(weights), dtype=DTYPE, device=CPU)


def load_smollm2(model: QSTModel) -> None:
    """Fill a model on the meta device with SmolLM2, which the quickstart has fetched.

    Args:
        model (QSTModel): over ``smollm2_135m``; its backbone is filled.
    """
    with TemporaryDirectory() as unused:  # torchtune would make the directory of a run
        block = OmegaConf.merge(default_config().checkpointer, {"output_dir": unused})
        checkpointer = instantiate(cast(DictConfig, block), "checkpointer")
        load_backbone(model, checkpointer, dtype=DTYPE, device=CPU)


def qst_model(name: str, **changes: Any) -> QSTModel:
    """Build a QST model whose side network is still on the meta device.

    Args:
        name (str): :data:`SMOLLM2`, or key of :data:`~benchmarks.backbones.BACKBONES`.
        **changes (Any): keys of the config's model block.

    Returns:
        QSTModel: its backbone has weights.
    """
    backbone = BACKBONES.get(name)
    with training.set_default_dtype(DTYPE), torch.device("meta"):
        decoder = llama3_2(**backbone.builder_arguments()) if backbone else smollm2_135m()
        model = qst_decoder(decoder, **{**model_arguments(), **changes})
    if backbone is None:
        load_smollm2(model)
    else:
        load_random_backbone(model, backbone)
    return model


def qst_trainee(model: QSTModel) -> Trainee:
    """Do what the recipe does once the backbone is loaded.

    Args:
        model (QSTModel): with its side network on the meta device.

    Returns:
        Trainee: with the config's loss and optimizer.
    """
    cfg = default_config()
    model.initialize_side(CPU)
    model.side.recompute = recomputes_by_default()
    model.train()
    loss = instantiate(cfg.loss, "loss")
    connect_loss(loss, model)
    optimizer = instantiate(cfg.optimizer, "optimizer", parameter_groups(model.side))
    return Trainee(model, loss, optimizer, cfg.get("clip_grad_norm"))


def model_arguments() -> dict[str, Any]:
    """Return our arguments in the config's model block, but for the format of the backbone.

    That is NF4, as in QLoRA: the config is of a model so small that it is better off with 8 bits.

    Returns:
        dict[str, Any]: for a builder of a QST model.
    """
    arguments: Any = OmegaConf.to_container(default_config().model, resolve=True)
    del arguments["_component_"]
    return {**arguments, "base_quantization": "nf4"}


def recomputes_by_default() -> bool:
    """Tell whether our config recomputes the side network.

    Returns:
        bool: True if it does.
    """
    return bool(default_config().get("enable_activation_checkpointing", False))


def ignore_known_warnings() -> None:
    """Silence what torch says at each use of torchtune's RMSNorm in bf16: it might be faster."""
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")


# The table.


@contextmanager
def _recompute(trainee: Trainee, enabled: bool) -> Iterator[None]:
    side: Any = trainee.model.side
    before, side.recompute = side.recompute, enabled
    try:
        yield
    finally:
        side.recompute = before


@contextmanager
def _contiguous_chunks(trainee: Trainee) -> Iterator[None]:
    """Spare torchtune a slow path of torch: make the chunks that go into the LM head contiguous.

    torchtune splits the head's input along the tokens, which leaves gaps between the rows. With
    gaps and a weight that does not train, torch 2.13 takes a batched product and on a CPU copies
    the whole weight for each row and chunk. A LoRA step with 4 layers on 4 x 128 tokens takes
    10.6 s so and 1.4 s without, and 119 MiB more (one busy core).
    """
    head: Any = trainee.model.output
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _best(trainee: Trainee) -> Iterator[None]:
    """Contiguous chunks, and NF4 decoded by our table: the same bits as torchao's loops give."""
    decoding = mock.patch.object(NF4Tensor, "get_original_weight", dequantize_nf4)
    with _contiguous_chunks(trainee), decoding:
        yield


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Args:
        title (str): for people.
        build (Callable[[Backbone], Trainee]): makes the model.
        model (str): methods of one name here take turns on one model and optimizer.
        running (Callable[[Trainee], AbstractContextManager[Any]]): holds during a step.
    """

    title: str
    build: Callable[[Backbone], Trainee]
    model: str
    running: Callable[[Trainee], AbstractContextManager[Any]] = lambda _: nullcontext()


def _qst_methods() -> dict[str, Method]:
    default_kind = default_config().model.get("downsample", VARIANTS["default"]["downsample"])
    methods = {}
    for kind in dict.fromkeys([default_kind, "adapter", "avgpool"]):
        name = "qst" if kind == default_kind else f"qst_{kind}"
        build = partial(_qst, downsample=kind)
        for suffix, how in (("stored", "stored"), ("recomputed", "recomputed")):
            title = f"QST, {kind}, side {how}"
            running = partial(_recompute, enabled=suffix == "recomputed")
            methods[f"{name}_{suffix}"] = Method(title, build, name, running)
    default_factor = default_config().model.get("reduction_factor", 16)
    for factor in (8, 16, 32):
        if factor != default_factor:
            build = partial(_qst, reduction_factor=factor)
            methods[f"qst_r{factor}"] = Method(f"QST, r = {factor}", build, f"qst_r{factor}")
    return methods


def _torchtune_methods() -> dict[str, Method]:
    """Each as it is, and without what slows it down on a CPU and is not the method's fault."""
    qlora = partial(_lora, quantize=True)
    checkpointed = partial(_lora, quantize=True, checkpointing=True)
    methods = {
        "full": Method("full fine-tuning", _full, "full"),
        "lora": Method("LoRA", _lora, "lora"),
        "lora_best": Method("LoRA + contiguous chunks", _lora, "lora", _contiguous_chunks),
    }
    for name, title, build in (
        ("qlora", "QLoRA", qlora),
        ("qlora_checkpointed", "QLoRA + checkpointing", checkpointed),
    ):
        chunks = f"{title} + contiguous chunks"
        best = f"{chunks} + our NF4 decoding"
        methods[name] = Method(title, build, name)
        methods[f"{name}_contiguous"] = Method(chunks, build, name, _contiguous_chunks)
        methods[f"{name}_best"] = Method(best, build, name, _best)
    return methods


METHODS: dict[str, Method] = {
    **_torchtune_methods(),
    **_qst_methods(),
}
# What all ratios are relative to: our default config.
REFERENCE = "qst_recomputed" if recomputes_by_default() else "qst_stored"


def default_factor() -> int:
    """Return the reduction factor of our default config.

    Returns:
        int: r.
    """
    return int(default_config().model.get("reduction_factor", 16))
