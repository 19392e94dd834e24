"""A run of nine steps, whole or cut after any of them, for tests of resuming and stopping."""

import shutil
from pathlib import Path
from typing import Any

import torch

from qst_tune.training.checkpoints import CheckpointStore
from tests.support.checkpoints import (
    Config,
    colour_rows,
    finetune_config,
    write_jsonl,
)
from tests.support.recipe_runs import FinetuneResult

NUM_STEPS = 9
# Seed 0, 12 rows: the order of torch's DistributedSampler.
BATCHES_OF_EPOCH_0 = (
    torch.randperm(12, generator=torch.Generator().manual_seed(0)).view(6, 2).tolist()
)
SETTINGS = [
    "epochs=3",
    "clip_grad_norm=1.0",
    "run_val_every_n_steps=2",
    "save_every_n_steps=1",
    "keep_last_n_checkpoints=100",
    "lr_scheduler._component_=torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "lr_scheduler.num_warmup_steps=2",
]
RESUME = "resume_from_checkpoint=True"
PLAIN_LOSS = "loss._component_=torch.nn.CrossEntropyLoss"


def nine_steps_config(root: Path) -> Config:
    """Three epochs of twelve rows, two batches of two a step."""
    config = finetune_config(root)
    write_jsonl(root / "train.jsonl", colour_rows(12))
    return {**config, "batch_size": 2, "gradient_accumulation_steps": 2}


def steps_of(run: Path) -> list[int]:
    return CheckpointStore(run / "checkpoints").steps()


def cut(run: FinetuneResult, directory: Path, step: int) -> Path:
    """A copy of a run's directory as it was after a step."""
    shutil.copytree(run.directory, directory)
    shutil.rmtree(directory / "side_network")
    (directory / "summary.json").unlink()
    for later in steps_of(directory):
        if later > step:
            shutil.rmtree(directory / "checkpoints" / f"step_{later:08}")
    return directory


def assert_identical(actual: FinetuneResult, expected: FinetuneResult) -> None:
    assert actual.weights_file.read_bytes() == expected.weights_file.read_bytes()
    for name in ("train_loss", "val_loss"):
        assert actual.summary[name] == expected.summary[name]


def faulty_loss(kind: str, directory: Path, **arguments: Any) -> list[str]:
    """Overrides: a loss of faults.py that goes wrong in the second half of the third step.

    Two batches of the validation set come before the first step and two after the second, then the
    first half of the third.
    """
    call = 2 + 2 * 2 + 2 + 2
    settings = {"call": call, "marker": directory.with_suffix(".marker"), **arguments}
    pairs = [f"loss.{key}={value}" for key, value in settings.items()]
    return [*SETTINGS, f"loss._component_=tests.support.faults.{kind}", *pairs, "batch_size_val=3"]
