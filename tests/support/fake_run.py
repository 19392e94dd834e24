"""A run of the training loop without a language model: a line is fitted to points."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save
from torch import nn
from torchtune.training import DummyProfiler

from qst_tune.data.batches.loader import Batch, BatchLoader
from qst_tune.data.batches.schedule import Schedule
from qst_tune.training.checkpoints import Checkpointing, CheckpointStore
from qst_tune.training.monitor import Monitor
from qst_tune.training.run_log import RunLog
from qst_tune.training.task import Passes
from qst_tune.training.trainer import Trainer

CPU = torch.device("cpu")


@dataclass
class FakeMethod:
    """A linear model; all of it trains."""

    model: nn.Linear
    result_name: ClassVar[str] = "line"

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]

    def files(self, results: dict[str, float]) -> dict[str, bytes]:
        return {"line.safetensors": save(self.model.state_dict()), "README.md": b"a line\n"}

    def with_other_formats(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        return dict(files)

    def load(self, directory: Path) -> None:
        self.model.load_state_dict(load_file(directory / "line.safetensors"))

    def statistics(self) -> dict[str, float]:
        return {}


@dataclass
class FakeTask:
    """Squared error; dropout makes every step draw random numbers.

    ``validation`` gives the figure of the n-th validation, in the place of the real one.
    """

    validation: Callable[[int], float] | None = None
    higher_is_better: bool = False
    num_validations: int = 0

    @property
    def monitor(self) -> Monitor:
        return Monitor("val_loss", self.higher_is_better)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        given = nn.functional.dropout(batch["tokens"], 0.1)
        errors = (model(given)[:, 0] - batch["labels"]).square()
        kept = batch["labels"] != -1
        return (errors * kept).sum(), kept.sum()

    def take_part(self, model: nn.Module) -> None:
        pass  # nothing is sharded

    @torch.no_grad()
    def evaluating(self, model: nn.Module, batches: Iterable[Batch]) -> Passes[dict[str, float]]:
        yield
        self.num_validations += 1
        if self.validation is not None:
            return {"val_loss": self.validation(self.num_validations - 1)}
        errors = [(model(b["tokens"])[:, 0] - b["labels"]).square() for b in batches]
        return {"val_loss": torch.cat(errors).mean().item()}


def collate(rows: list[dict[str, Any]]) -> Batch:
    tokens = torch.tensor([row["tokens"] for row in rows], dtype=torch.float32)
    return {"tokens": tokens, "labels": torch.tensor([row["label"] for row in rows])}


def points(count: int) -> list[dict[str, Any]]:
    inputs = torch.randn(count, 3, generator=torch.Generator().manual_seed(1))
    return [{"tokens": x.tolist(), "label": x.sum().item()} for x in inputs]


def fake_trainer(
    directory: Path,
    *,
    rows: list[dict[str, Any]] | None = None,
    task: FakeTask | None = None,
    schedule: Schedule | None = None,
    every: int | None = None,
    keep: int | None = None,
    batch_size: int = 2,
    clip_grad_norm: float | None = None,
) -> Trainer:
    """Two epochs of six batches of two points by AdamW under a schedule, unless changed."""
    rows = points(12) if rows is None else rows
    directory.mkdir(exist_ok=True)
    torch.manual_seed(0)
    method = FakeMethod(nn.Linear(3, 1))
    train = BatchLoader(rows, collate, batch_size=batch_size, seed=0)
    schedule = schedule or Schedule(epochs=2, steps_per_epoch=len(train))
    optimizer = torch.optim.AdamW(method.parameter_groups(), lr=0.1)
    return Trainer(
        method=method,
        task=task or FakeTask(),
        train_data=train,
        validation_data=BatchLoader(points(5), collate, batch_size=2, seed=None, drop_last=False),
        schedule=schedule,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, schedule.num_steps),
        clip_grad_norm=clip_grad_norm,
        seed=7,
        device=CPU,
        checkpointing=Checkpointing(
            CheckpointStore(directory / "checkpoints"), {}, schedule.steps_per_epoch, every, keep
        ),
        run_log=RunLog(None, directory=directory, device=CPU),
        profiler=DummyProfiler(),
    )
