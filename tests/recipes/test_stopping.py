"""A run that is stopped or goes wrong saves what is good, names why, and can be resumed."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qst_tune.errors import UserError
from qst_tune.results.description import SIDE_NETWORK
from tests.support.checkpoints import (
    Config,
)
from tests.support.nine_steps import (
    BATCHES_OF_EPOCH_0,
    NUM_STEPS,
    RESUME,
    SETTINGS,
    assert_identical,
    faulty_loss,
    steps_of,
)
from tests.support.recipe_runs import FinetuneResult, finetune


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_signal_finishes_the_step_and_saves(
    name: str,
    status: int,
    nine_steps: Config,
    plain_whole: FinetuneResult,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "run"
    settings = faulty_loss("SignalledLoss", directory, signal_name=name)
    settings += ["save_every_n_steps=null"]
    handler = signal.getsignal(signal.Signals[name])
    with pytest.raises(SystemExit) as stopped:
        finetune(nine_steps, directory, *settings)
    assert stopped.value.code == status
    assert signal.getsignal(signal.Signals[name]) is handler
    captured = capfd.readouterr()
    assert f"{name}: finishing this step, then saving" in captured.err
    assert f"stopped by {name} after step 3 of {NUM_STEPS}" in captured.out
    assert steps_of(directory) == [2, 3]
    assert (directory / "side_network").is_dir()
    assert_identical(finetune(nine_steps, directory, *settings, RESUME), plain_whole)


@pytest.mark.parametrize("write", [0, 8])
def test_full_disk_is_one_line_and_leaves_the_last_good_checkpoint(
    write: int,
    nine_steps: Config,
    whole: FinetuneResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_files = 8 + 3  # of a checkpoint, and their directories
    count = iter(range(10**6))
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if next(count) == 4 * num_files + write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UserError) as error:
            finetune(nine_steps, tmp_path / "run", *SETTINGS)
    assert "cannot write" in str(error.value)
    assert "step_00000005: No space left on device; the last good checkpoint is" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]
    assert_identical(finetune(nine_steps, tmp_path / "run", *SETTINGS, RESUME), whole)


@pytest.mark.parametrize(
    ("kind", "arguments", "what"),
    [
        ("PoisonedLoss", {"value": "nan"}, "the loss is nan"),
        ("PoisonedLoss", {"value": "inf"}, "the loss is inf"),
        ("PoisonedGradient", {}, "the gradient's norm nan"),
    ],
)
def test_step_that_is_not_finite_stops_the_run_with_its_rows(
    kind: str,
    arguments: dict[str, str],
    what: str,
    nine_steps: Config,
    plain_whole: FinetuneResult,
    tmp_path: Path,
) -> None:
    directory = tmp_path / "run"
    settings = [*faulty_loss(kind, directory, **arguments), "save_every_n_steps=100"]
    with pytest.raises(UserError) as error:
        finetune(nine_steps, directory, *settings)
    assert str(error.value).startswith("step 3: the loss is ")
    assert what in str(error.value)
    rows = BATCHES_OF_EPOCH_0[4] + BATCHES_OF_EPOCH_0[5]
    assert f"(rows {', '.join(map(str, rows))} of the dataset)" in str(error.value)
    assert steps_of(directory) == [2], "the steps before it are saved"
    assert_identical(finetune(nine_steps, directory, *settings, RESUME), plain_whole)


def test_steps_that_are_not_finite_can_be_left_out(nine_steps: Config, tmp_path: Path) -> None:
    settings = faulty_loss("PoisonedLoss", tmp_path / "run", value="nan")
    run = finetune(nine_steps, tmp_path / "run", *settings, "skip_bad_steps=1")
    assert len(run.summary["train_loss"]) == NUM_STEPS - 1
    assert "3" not in run.summary["train_loss"]
    before, after = (
        load_file(
            run.directory
            / f"checkpoints/step_0000000{step}/side_network"
            / SIDE_NETWORK.weights_file
        )
        for step in (2, 3)
    )
    assert all(torch.equal(before[name], after[name]) for name in before), "nothing was applied"
    assert all(tensor.isfinite().all() for tensor in run.weights.values())


def test_at_most_so_many_steps_are_left_out(nine_steps: Config, tmp_path: Path) -> None:
    # Step 3 is left out; it changed nothing, so the next one is not finite either.
    with pytest.raises(UserError, match=r"step 4: the loss is nan .* set skip_bad_steps="):
        finetune(nine_steps, tmp_path / "run", *SETTINGS, "optimizer.lr=1e30", "skip_bad_steps=1")
