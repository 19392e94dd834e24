"""One training step of a config's own model, on the meta device: QST, PEQA, a classifier, DPO."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torchtune.modules import RMSNorm

from qst_tune.config.components import instantiate
from qst_tune.config.schema import StepConfig
from qst_tune.data.batches.collate import align_labels
from qst_tune.data.batches.loader import Batch
from qst_tune.errors import UserError
from qst_tune.estimation.fake_device import Attention, UnknownValues
from qst_tune.models.build import build_any_on_meta
from qst_tune.modules.loss import connect_loss
from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.modules.qst_model import QSTModel
from qst_tune.training.classification import ClassificationTask
from qst_tune.training.language_modelling import NextTokenTask, build_loss
from qst_tune.training.methods import parameter_groups
from qst_tune.training.preference import PreferenceTask, check_loss, reference_of

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

    Args:
        title (str): name of the method, for people.
        model (Any): built, connected to the loss.
        task (Any): a ``Task`` with a ``loss_function``.
        trainable (Callable[[], Any]): the optimizer's parameters or groups, once the model has
            its final tensors.
        dtype (torch.dtype): of what is not quantised.
        attention (Attention | None): overrides the one asked for.
    """

    title: str
    model: Any
    task: Any
    trainable: Callable[[], Any]
    dtype: torch.dtype
    attention: Attention | None = None

    def part_rows(self, seq_len: int) -> int:
        """Rows of a batch that run through the whole model before the next ones do."""
        if not isinstance(self.model, QSTModel):
            return ALL_ROWS
        tokens = torch.empty(ALL_ROWS, seq_len, dtype=torch.int64, device="meta")
        return int(self.model.backbone.row_parts(tokens, None)[0].stop)

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


def own_setup(cfg: StepConfig, dtype: torch.dtype) -> Setup:
    """Set up a step of the config's own model, as its training recipe does.

    ``dtype`` is of what is not quantised. UserError if the model is neither QST nor PEQA.
    """
    model = build_any_on_meta(cfg.model, dtype)
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
            # In backward torch takes the modes of the caller away.
            wrapper.checkpoint_fn = partial(wrapper.checkpoint_fn, context_fn=_fake_recomputation)
    loss = build_loss(cfg.loss)
    connect_loss(loss, model)
    title = "PEQA, checkpointed" if checkpointing else "PEQA"
    task = NextTokenTask(loss, _CPU)
    return Setup(title, model, task, lambda: list(model.task().values()), dtype)


def _fake_recomputation() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), UnknownValues(lambda times: None)


def keep_norms_in_fp32(model: nn.Module) -> None:
    """Change torchtune's norms in place, as loading a checkpoint does."""
    for module in list(model.modules()):
        if isinstance(module, RMSNorm):
            scale = module.scale
            module.scale = nn.Parameter(scale.float(), requires_grad=scale.requires_grad)
