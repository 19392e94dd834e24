"""Our methods: a QST model over random NF4 weights, and the step that the recipe takes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.optim import AdamW
from torchtune import training
from torchtune.models.llama3_2 import llama3_2

from benchmarks.backbones import DTYPE, Backbone
from benchmarks.gpu.random_weights import RandomWeights
from benchmarks.gpu.turns import Step
from benchmarks.methods import Batch
from qst_tune.data.batches.schedule import Schedule
from qst_tune.models import qst_decoder
from qst_tune.modules import LinearCrossEntropyLoss
from qst_tune.modules.captured_passes import MOST_TOKENS, PLAIN_PASSES, CapturedPasses
from qst_tune.modules.loss import connect_loss
from qst_tune.modules.qst_model import QSTModel
from qst_tune.quantization.kernels import allow_triton
from qst_tune.training.language_modelling import NextTokenTask
from qst_tune.training.methods import TunedMethod, scale_rates
from qst_tune.training.trainer import Trainer


def qst_model(backbone: Backbone, weights: RandomWeights, **arguments: Any) -> QSTModel:
    """Build a model as the recipe loads it; ``arguments`` are of a config's model block."""
    with training.set_default_dtype(DTYPE), torch.device("meta"):
        model = qst_decoder(llama3_2(**backbone.builder_arguments()), **arguments)
    weights.fill_(model)
    model.initialize_side(weights.device)
    model.side.recompute = True
    if weights.device.type == "cuda":
        model.captured_passes = CapturedPasses()
    return model


def dial_model(backbone: Backbone, weights: RandomWeights, *, part: float) -> QSTModel:
    """Build a model with LoRA in the last layers, this part of them."""
    return qst_model(backbone, weights, lora_layers=max(1, round(backbone.num_layers * part)))


def recipe_step(model: QSTModel) -> Step:
    """Take a step of the recipe's own loop, which logs nothing here."""
    device = next(model.side.parameters()).device
    loss = LinearCrossEntropyLoss()
    connect_loss(loss, model)
    method = TunedMethod(model, provenance=_not_used())
    optimizer = AdamW(method.parameter_groups(), lr=1e-4, fused=True)
    scale_rates(optimizer)
    trainer = Trainer(
        method=method,
        task=NextTokenTask(loss, device),
        train_data=_not_used(),
        validation_data=None,
        schedule=Schedule(epochs=1, steps_per_epoch=1_000_000),
        optimizer=optimizer,
        lr_scheduler=None,
        clip_grad_norm=1.0,
        seed=0,
        device=device,
        checkpointing=_not_used(),
        run_log=_silent(),
        profiler=nullcontext(),
    )

    seen: set[torch.Size] = set()

    def step(batch: Batch) -> None:
        model.train()
        shape = batch["tokens"].shape
        # A shape that comes up again is captured then.
        is_new = shape not in seen and shape.numel() <= MOST_TOKENS
        seen.add(shape)
        for _ in range(PLAIN_PASSES + 2 if is_new else 1):
            for _turn in trainer._train_step(iter([dict(batch)])):
                pass  # another run over the same backbone would take its turn here

    return step


def plain_step(model: QSTModel) -> Step:
    """Take the same step without Triton's kernels and captured passes, as on other devices."""
    take = recipe_step(model)

    def step(batch: Batch) -> None:
        captured, model.captured_passes = model.captured_passes, None
        try:
            with without_triton():
                take(batch)
        finally:
            model.captured_passes = captured

    return step


@contextmanager
def without_triton() -> Iterator[None]:
    """Compute with torch's operations alone."""
    allow_triton(False)
    try:
        yield
    finally:
        allow_triton(True)


def _not_used() -> Any:
    """Stand for what a single step does not touch."""
    return None


def _silent() -> Any:
    """A run log that is never due."""

    class Silent:
        def is_due(self, step: int) -> bool:
            return False

        def step(self, step: int, metrics: dict[str, float]) -> None:
            assert metrics["loss"] > 0

    return Silent()
