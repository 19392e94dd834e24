"""One training step of a config's own model, on the meta device: QST, PEQA, a classifier, DPO."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.optim import Optimizer
from torchtune import training
from torchtune.modules import RMSNorm

from qst_tune.config.components import instantiate
from qst_tune.config.schema import StepConfig
from qst_tune.data.batches.collate import align_labels
from qst_tune.data.batches.loader import Batch
from qst_tune.errors import UserError
from qst_tune.estimation.batch_peaks import Shorten
from qst_tune.estimation.fake_device import (
    Attention,
    DeviceType,
    allocate_fake,
    device_kernels,
    fake_tensors,
    recomputation,
    workspace_of,
)
from qst_tune.estimation.skipped_layers import runs, skip, stand_ins, with_skipped
from qst_tune.estimation.tracker import PeakMemory, StorageTracker, Timeline
from qst_tune.estimation.watch import watched
from qst_tune.models.build import build_any_on_meta
from qst_tune.modules.loss import connect_loss
from qst_tune.modules.meta_device import build_rotary_caches
from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.modules.qst_model import QSTModel
from qst_tune.training.classification import ClassificationTask
from qst_tune.training.language_modelling import NextTokenTask, build_loss
from qst_tune.training.methods import parameter_groups
from qst_tune.training.preference import PreferenceTask, check_loss, reference_of
from qst_tune.training.task import TOKENS_AT_ONCE, parts_of

_CPU = torch.device("cpu")
ALL_ROWS = 2**20  # more than any batch


@dataclass(frozen=True)
class Shape:
    """Size of one batch: rows, or pairs of rows for preferences, and tokens a row."""

    batch_size: int
    seq_len: int


@dataclass
class Setup:
    """What one training step needs, on the meta device.

    ``trainable``: the optimizer's parameters or groups, once the model has its final tensors.
    """

    title: str  # name of the method, for people
    model: Any  # built, connected to the loss
    task: Any  # a ``Task`` with a ``loss_function``
    trainable: Callable[[], Any]
    dtype: torch.dtype  # of what is not quantised
    attention: Attention | None = None  # overrides the one asked for

    def part_rows(self, seq_len: int) -> int:
        """Rows of a batch that run through the whole model before the next ones do."""
        if not isinstance(self.model, QSTModel):
            return ALL_ROWS
        tokens = torch.empty(ALL_ROWS, seq_len, dtype=torch.int64, device="meta")
        return int(self.model.backbone.row_parts(tokens, None)[0].stop)

    def rows_at_once(self, seq_len: int) -> int | None:
        """Rows, or pairs, that run forward and backward before the next ones; None: all do."""
        side = self.model.side if isinstance(self.model, QSTModel) else None
        if side is None or side.lora is None:
            return None
        return max(1, TOKENS_AT_ONCE // (seq_len * int(self.task.rows_an_example)))

    def batch(self, shape: Shape) -> Batch:
        """Make a batch as the task's collate function does: no padding, all tokens are labels."""
        vocabulary = self.model.tok_embeddings.weight.shape[0]
        rows = shape.batch_size * (2 if isinstance(self.task, PreferenceTask) else 1)
        tokens = torch.randint(vocabulary, (rows, shape.seq_len))
        if isinstance(self.task, ClassificationTask):
            labels = torch.randint(self.model.num_labels, (rows,))
            is_score = self.model.num_labels == 1
            mask = torch.ones_like(tokens, dtype=torch.bool)
            labels = labels.float() if is_score else labels
            return {"tokens": tokens, "padding_mask": mask, "labels": labels}
        return {"tokens": tokens, "labels": align_labels(torch.randint_like(tokens, vocabulary))}


def own_setup(cfg: StepConfig, dtype: torch.dtype, lora_layers: int | None = None) -> Setup:
    """Set up a step of the config's own model, as its training recipe does.

    ``dtype`` is of what is not quantised; ``lora_layers`` replaces the config's unless it is None.
    UserError if the model is neither QST nor PEQA.
    """
    block = cfg.model
    if lora_layers is not None:
        block = block.copy()  # which keeps its parent, where interpolations lead
        block.lora_layers = lora_layers
    model = build_any_on_meta(block, dtype)
    recompute = cfg.enable_activation_checkpointing
    if isinstance(model, PEQAModel):
        return peqa_setup(cfg, model, dtype, checkpointing=recompute)
    if isinstance(model, QSTModel):
        return qst_setup(cfg, model, dtype, recompute=recompute)
    raise UserError(
        f"model: {cfg.model._component_} builds neither a QST nor a PEQA model; use one of "
        "qst_tune.models.qst_* or peqa_*"
    )


def qst_setup(cfg: StepConfig, model: QSTModel, dtype: torch.dtype, *, recompute: bool) -> Setup:
    """Set up a step as recipes/qst_finetune.py and qst_dpo.py do."""
    keep_norms_in_fp32(model)
    model.side.recompute = recompute
    loss = instantiate(cfg.loss, "loss")
    task: Any
    title = "QST"
    if isinstance(model, QSTClassifier):
        task, title = ClassificationTask(loss, ["accuracy"], _CPU), "QST, classifier"
    elif hasattr(loss, "ignore_index"):
        connect_loss(loss, model)
        task = NextTokenTask(loss, _CPU)
    else:
        check_loss(loss, cfg.loss._component_)
        if reference_of(cfg) == "start":
            model.keep_reference()
        task, title = PreferenceTask(loss, _CPU), "QST, DPO"
    title += ", recomputed" if recompute else ""
    return Setup(title, model, task, lambda: parameter_groups(model.side), dtype)


def peqa_setup(
    cfg: StepConfig, model: PEQAModel, dtype: torch.dtype, *, checkpointing: bool
) -> Setup:
    """Set up a step as recipes/peqa_finetune.py does."""
    keep_norms_in_fp32(model)
    if checkpointing:
        model.recompute_layers()
        for wrapper in (m for m in model.modules() if isinstance(m, CheckpointWrapper)):
            wrapper.checkpoint_fn = partial(wrapper.checkpoint_fn, context_fn=recomputation)
    loss = build_loss(cfg.loss)
    connect_loss(loss, model)
    title = "PEQA, checkpointed" if checkpointing else "PEQA"
    task = NextTokenTask(loss, _CPU)
    return Setup(title, model, task, lambda: list(model.task().values()), dtype)


def keep_norms_in_fp32(model: nn.Module) -> None:
    """Change torchtune's norms in place, as loading a checkpoint does."""
    for module in list(model.modules()):
        if isinstance(module, RMSNorm):
            scale = module.scale
            module.scale = nn.Parameter(scale.float(), requires_grad=scale.requires_grad)


CUDA_GRANULARITY = 512  # bytes, of torch's caching allocator


@dataclass(frozen=True)
class StepCost:
    """What one training step takes."""

    memory: PeakMemory  # peak in the steady state, when the optimizer has its states
    flops_per_token: float  # forward and backward, recomputation included
    trainable_parameters: int  # number of them


def trace_step(
    setup: Setup,
    cfg: StepConfig,
    shape: Shape,
    *,
    device: DeviceType,
    attention: Attention = "fused",
    shorten: Shorten | None = None,
) -> tuple[StepCost, Timeline]:
    """Run one training step on fake tensors: what it costs, and every allocation.

    The setup is on meta and used up. ``cfg`` has ``optimizer`` and perhaps ``clip_grad_norm``;
    ``attention`` counts unless the setup has its own; ``shorten`` changes the model first, in
    place. UserError if a row is longer than the model's longest sequence.
    """
    if shorten is not None:
        shorten(setup.model)
    longest = setup.model.max_seq_len
    if shape.seq_len > longest:
        raise UserError(
            f"tokenizer.max_seq_len={shape.seq_len} is longer than the model's max_seq_len "
            f"{longest}: lower it"
        )
    # Real ones first, since Llama 3's code reads what it puts into them.
    build_rotary_caches(setup.model, _CPU)
    with fake_tensors(setup.dtype):
        for module in _modules(setup):
            allocate_fake(module, device)
        return run_step(setup, cfg, shape, device=device, attention=setup.attention or attention)


def trace_forward(setup: Setup, seq_len: int, *, device: DeviceType) -> float:
    """Count the operations a token of one pass through a QST setup's backbone and its LM head."""
    model, tracker = setup.model, StorageTracker()
    skipped = stand_ins(model)
    skip(model, list(skipped))
    build_rotary_caches(model, _CPU)
    with fake_tensors(setup.dtype), torch.no_grad():
        allocate_fake(model, device)
        tokens = setup.batch(Shape(1, seq_len))["tokens"]
        with (
            device_kernels(device, repeat=tracker.repeat),
            tracker,
            watched(tracker, setup.model, setup.task.loss_function),
        ):
            tracker.enter("forward")
            model.output(model.backbone.run(tokens, taps=(), visit=lambda h: None))
    return with_skipped(tracker.timeline(), skipped).flops / tokens.numel()


def run_step(
    setup: Setup, cfg: StepConfig, shape: Shape, *, device: DeviceType, attention: Attention
) -> tuple[StepCost, Timeline]:
    """Run one tracked training step on tensors that exist, fake or real; as :func:`trace_step`."""
    optimizer = make_optimizer(setup, cfg, device)
    batch = setup.batch(shape)
    tracker = StorageTracker(
        granularity=CUDA_GRANULARITY if device == "cuda" else 1, workspace=workspace_of(device)
    )
    _register(tracker, setup, optimizer, batch)
    gc.collect()
    kernels = device_kernels(device, attention, tracker.repeat)
    with kernels, tracker, watched(tracker, setup.model, setup.task.loss_function):
        num_tokens = train_step(setup, optimizer, batch, cfg.clip_grad_norm, tracker)
    cost = StepCost(
        memory=tracker.peak(),
        flops_per_token=tracker.flops / num_tokens,
        trainable_parameters=sum(p.numel() for p in _trainable(setup.model)),
    )
    return cost, tracker.timeline()


def make_optimizer(setup: Setup, cfg: StepConfig, device: DeviceType) -> Optimizer:
    """Build the config's optimizer, with its states as after a first step.

    CUDA's default is to update all parameters in one kernel a step. No parameter has a gradient.
    """
    optimizer: Optimizer = instantiate(cfg.optimizer, "optimizer", setup.trainable())
    for group in optimizer.param_groups:
        if device == "cuda" and group.get("foreach", 0) is None and not group.get("fused"):
            group["foreach"] = True
    for parameter in _trainable(setup.model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def train_step(
    setup: Setup,
    optimizer: Optimizer,
    batch: dict[str, torch.Tensor],
    clip_grad_norm: float | None,
    tracker: StorageTracker | None = None,
) -> int:
    """Do what the recipes do in one step; ours and torchtune's agree in it.

    ``batch`` is from ``Setup.batch``; the tracker gets the phases. Returns the number of tokens.
    """
    enter = tracker.enter if tracker else lambda _: None
    total, num_tokens = 0, 0
    for part in parts_of(setup.task, setup.model, batch):
        enter("forward")
        loss_sum, num_labels = setup.task.loss(setup.model, part)
        enter("loss backward")
        loss_sum.backward()
        total, num_tokens = total + num_labels, num_tokens + part["tokens"].numel()
    if tracker is not None:
        tracker.enter("setup")
        _add_gradients(setup.model)
    enter("optimizer")
    training.scale_grads(setup.model, 1 / total)
    if clip_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(_trainable(setup.model), max_norm=float(clip_grad_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return num_tokens


def _add_gradients(model: Any) -> None:
    """Give the LoRA of layers that did not run the gradients that it would have now."""
    side = model.side if isinstance(model, QSTModel) else None
    if side is None or side.lora is None:
        return
    for index in range(side.lora.first, len(model.layers)):
        if not runs(model.layers[index]):
            for parameter in side.lora[str(index)].parameters():
                parameter.grad = torch.zeros_like(parameter)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _modules(setup: Setup) -> list[nn.Module]:
    """The model, and the frozen side network that is the reference of DPO."""
    reference = getattr(setup.model, "reference_side", None)
    return [setup.model] if reference is None else [setup.model, reference]


def _register(
    tracker: StorageTracker, setup: Setup, optimizer: Optimizer, batch: Mapping[str, object]
) -> None:
    trainable = _trainable(setup.model)
    for module in _modules(setup):
        tracker.register([*module.parameters(), *module.buffers()], "frozen weights")
    tracker.register(trainable, "trainable weights")
    tracker.register(list(optimizer.state.values()), "optimizer states")
    tracker.register(batch, "saved activations")
