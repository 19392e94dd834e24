"""The loop's properties on a tiny task; what a run reports of itself, and where it refuses."""

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from qst_tune.data.batches.loader import Batch
from qst_tune.data.batches.schedule import Schedule
from qst_tune.errors import UserError
from qst_tune.training.state_file import unpack_state
from qst_tune.training.stop_signals import SIGNALS
from qst_tune.training.task import complete
from qst_tune.training.trainer import Trainer
from tests.support.checkpoints import Config, colour_rows, finetune_config, write_jsonl
from tests.support.fake_run import FakeTask, fake_trainer, points
from tests.support.recipe_runs import finetune

# The loop, with a line that is fitted to points.


def outcome(trainer: Trainer) -> tuple[dict[int, float], dict[int, float], bytes]:
    summary = trainer.run_log.summary
    weights = trainer.run_log.directory / "line" / "line.safetensors"
    return summary.train_loss, summary.val_loss, weights.read_bytes()


@pytest.mark.parametrize("step", [1, 5, 6, 7, 11])
def test_run_resumed_at_any_step_is_the_run_that_was_never_stopped(
    step: int, tmp_path: Path
) -> None:
    whole = fake_trainer(tmp_path / "whole", every=1)
    whole.fit()
    saved = whole.checkpointing.store.path(step)
    resumed = fake_trainer(tmp_path / "resumed", every=1)
    shutil.copytree(saved, resumed.checkpointing.store.path(step))
    resumed.method.load(saved / "line")
    resumed.restore(unpack_state(saved))
    resumed.fit()
    assert outcome(resumed) == outcome(whole)


def test_every_label_weighs_the_same_however_rows_are_spread_over_batches(tmp_path: Path) -> None:
    rows = points(12)
    rows[3]["label"] = -1.0  # no label
    weights = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer = fake_trainer(
            tmp_path / str(batch_size),
            rows=rows,
            batch_size=batch_size,
            schedule=Schedule(epochs=1, steps_per_epoch=3, accumulation=accumulation),
        )
        trainer.task.loss = no_dropout  # type: ignore[method-assign]
        trainer.fit()
        weights.append(trainer.method.model.weight.detach().clone())
    torch.testing.assert_close(weights[1], weights[0])
    torch.testing.assert_close(weights[2], weights[0])


@contextmanager
def counted_looks_at_tensors() -> Iterator[list[str]]:
    """Everything that makes Python wait for a device, by name."""
    looks: list[str] = []
    with ExitStack() as stack:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu"):
            original = getattr(torch.Tensor, name)

            def counted(self: Any, *args: Any, name: str = name, original: Any = original) -> Any:
                looks.append(name)
                return original(self, *args)

            stack.enter_context(mock.patch.object(torch.Tensor, name, counted))
        yield looks


def test_a_step_looks_at_its_figures_once_and_waits_for_the_device_no_further_time(
    tmp_path: Path,
) -> None:
    trainer = fake_trainer(
        tmp_path / "run",
        schedule=Schedule(epochs=1, steps_per_epoch=3, accumulation=2),
        clip_grad_norm=1.0,
    )
    trainer.lr_scheduler = None
    trainer.optimizer.step = lambda: None  # type: ignore  # on a CPU AdamW counts in a tensor
    batches = iter(list(trainer.train_data.batches(0)))
    with counted_looks_at_tensors() as looks, trainer.run_log.progress(3, 0):
        complete(trainer._train_step(batches))
    assert looks == ["tolist"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("always")
def test_on_a_gpu_a_step_waits_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    trainer = fake_trainer(tmp_path / "run", clip_grad_norm=1.0)
    trainer.device = torch.device("cuda")
    trainer.method.model.cuda()
    batches = trainer.train_data.batches(0)
    with trainer.run_log.progress(3, 0):
        complete(trainer._train_step(batches))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            complete(trainer._train_step(batches))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in recwarn if "synchronizing CUDA" in str(w.message)]
    assert len(waits) == 1, waits


def no_dropout(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    kept = batch["labels"] != -1
    return ((model(batch["tokens"])[:, 0] - batch["labels"]).square() * kept).sum(), kept.sum()


@pytest.mark.parametrize(("better", "best"), [(False, 6), (True, 3)])
def test_the_result_is_that_of_the_best_validated_step(
    better: bool, best: int, tmp_path: Path
) -> None:
    figures = [5.0, 4.0, 1.0, 2.0, 3.0]  # before the first step, then every third step
    task = FakeTask(figures.__getitem__, higher_is_better=better)
    schedule = Schedule(epochs=2, steps_per_epoch=6, validate_every=3)
    trainer = fake_trainer(tmp_path / "run", task=task, schedule=schedule, keep=1)
    trainer.fit()
    assert trainer.run_log.summary.best_step == best
    store = trainer.checkpointing.store
    assert store.steps() == sorted({best, 12})
    exported = (tmp_path / "run" / "line" / "line.safetensors").read_bytes()
    assert exported == (store.path(best) / "line" / "line.safetensors").read_bytes()


def test_patience_ends_the_run(tmp_path: Path) -> None:
    task = FakeTask([5.0, 4.0, 4.0, 4.5, 1.0].__getitem__)
    schedule = Schedule(epochs=2, steps_per_epoch=6, validate_every=3, patience=2)
    trainer = fake_trainer(tmp_path / "run", task=task, schedule=schedule)
    trainer.fit()
    assert (trainer.progress.step, trainer.progress.best_step) == (9, 3)


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_steps_that_are_not_finite_are_skipped_as_often_as_allowed(
    allowed: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = points(12)
    rows[4]["tokens"][0] = math.inf
    schedule = Schedule(epochs=2, steps_per_epoch=6, max_bad_steps=allowed)
    trainer = fake_trainer(tmp_path / "run", rows=rows, schedule=schedule, task=FakeTask(float))
    if allowed == 2:
        trainer.fit()
        assert trainer.run_log.summary.skipped_steps == 2
        assert all(parameter.isfinite().all() for parameter in trainer.trained)
        return
    with pytest.raises(UserError, match=r"the loss is (inf|nan) .*rows .*\b4\b.* of the dataset"):
        trainer.fit()
    assert trainer.progress.skipped_steps == allowed
    assert trainer.checkpointing.store.steps()[-1] == trainer.progress.step, "nothing is lost"


@pytest.mark.parametrize("kind", SIGNALS)
def test_a_signal_ends_the_run_after_its_step_and_its_checkpoint(
    kind: signal.Signals, tmp_path: Path
) -> None:
    trainer = fake_trainer(tmp_path / "run")
    loss = trainer.task.loss

    def loss_and_signal(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if trainer.progress.step == 3:
            os.kill(os.getpid(), kind)
        return loss(*args)

    trainer.task.loss = loss_and_signal  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as left:
        trainer.fit()
    assert left.value.code == 128 + kind
    assert trainer.checkpointing.store.newest() == (4, [])
    assert (tmp_path / "run" / "line").is_dir()


def test_gradients_are_clipped_together(tmp_path: Path) -> None:
    norms = []
    trainer = fake_trainer(tmp_path / "run", clip_grad_norm=0.5)
    trainer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.nn.utils.get_total_norm([p.grad for p in trainer.trained]))
    )
    trainer.fit()
    assert len(norms) == 12
    assert max(norms) == pytest.approx(0.5, rel=1e-4)


def test_a_damaged_best_checkpoint_is_not_exported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    figures = [9.0, 4.0, 1.0, 2.0, 3.0]
    schedule = Schedule(epochs=2, steps_per_epoch=6, validate_every=3)
    trainer = fake_trainer(tmp_path / "run", schedule=schedule, every=3)
    store = trainer.checkpointing.store

    def figure(number: int) -> float:
        if number == 4:  # after the last step
            (store.path(6) / "line" / "line.safetensors").write_bytes(b"")
        return figures[number]

    trainer.task.validation = figure
    trainer.fit()
    out = capfd.readouterr().out
    assert "the checkpoint of step 6, the best so far, is damaged (line/line.safetensors" in out
    assert "step 9 is the next best" in out
    assert "step 9 of 12, the best step whose checkpoint is not damaged" in out
    assert trainer.run_log.summary.best_step == 9
    exported = (tmp_path / "run" / "line" / "line.safetensors").read_bytes()
    assert exported == (store.path(9) / "line" / "line.safetensors").read_bytes()
    assert (store.directory / "damaged_step_00000006").is_dir()


def test_an_output_directory_that_is_removed_meanwhile_is_one_line(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path / "run", every=4)
    step = trainer.checkpointing.is_due

    def remove(number: int) -> bool:
        if number == 5:
            shutil.rmtree(tmp_path / "run")
        return step(number)

    object.__setattr__(trainer.checkpointing, "is_due", remove)
    with pytest.raises(UserError, match=r"^cannot write .*step_00000006: .* was removed"):
        trainer.fit()
    assert not (tmp_path / "run").exists()


# Through a recipe.


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return finetune_config(tmp_path)


def with_rows(config: Config, rows: list[dict[str, str]]) -> Config:
    path = Path(config["dataset"]["data_files"]).with_name("own.jsonl")
    return {**config, "dataset": {**config["dataset"], "data_files": str(write_jsonl(path, rows))}}


LONG = {"input": "red " * 60, "output": "green"}  # fills the tokenizer's max_seq_len of 64


def test_run_that_makes_the_model_worse_is_reported_as_that_everywhere(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [LONG, *colour_rows(3)]
    run = finetune(
        with_rows(config, rows),
        tmp_path / "run",
        "batch_size=1",
        "shuffle=False",
        "epochs=1",
        "optimizer.lr=3.0",
    )
    loss = run.val_loss
    verdict = (
        "no validated step is better than the quantised base model: validation loss "
        f"{loss[4]:.4f} at step 4, {loss[0]:.4f} before training"
    )
    assert loss[4] > loss[0]
    assert run.summary["verdict"] == verdict
    out = capfd.readouterr().out
    assert f"warning: {verdict}" in out
    assert "step 4 of 4, the best of the validated steps" in out
    assert verdict in (run.directory / "summary.md").read_text()
    assert verdict in (run.directory / "side_network" / "README.md").read_text()
    description = json.loads((run.directory / "side_network" / "qst_config.json").read_text())
    assert description["verdict"] == verdict

    first = "warning: step 1 learns nothing, since none of its rows (0 of the dataset) has a label"
    assert first in out
    assert "warning: 1 of 4 steps had no label and changed nothing: raise tokenizer." in out
    assert run.summary["empty_steps"] == 1
    assert list(run.summary["train_loss"]) == ["2", "3", "4"], "no loss is 0 where none was found"


def test_run_in_which_no_step_has_a_label_ends_with_an_error(
    config: Config, tmp_path: Path
) -> None:
    rows = with_rows(config, [LONG, *colour_rows(1)])
    settings = ["batch_size=1", "shuffle=False", "max_steps_per_epoch=1", "dataset_val=null"]
    with pytest.raises(UserError, match=r"^dataset: no step had a label, so nothing was learnt"):
        finetune(rows, tmp_path / "run", *settings, "epochs=1")
    assert not (tmp_path / "run" / "side_network").exists()


def test_fp16_learns_what_fp32_learns(config: Config, tmp_path: Path) -> None:
    fp32, fp16 = (
        finetune(config, tmp_path / dtype, f"dtype={dtype}", "epochs=2", "shuffle=False")
        for dtype in ("fp32", "fp16")
    )
    # NF4's levels are rounded to the dtype. Relative.
    torch.testing.assert_close(fp16.train_loss, fp32.train_loss, rtol=5e-3, atol=0)
    assert all(weight.dtype == torch.float32 for weight in fp16.weights.values())


def test_activations_beyond_fp16_end_the_run_with_its_name(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = Path(config["checkpointer"]["checkpoint_dir"]) / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**weights, name: weights[name] * 1e5}, path, metadata={"format": "pt"})
    end = r"dtype=fp16 ends at 65504, and activations of some models"
    with pytest.raises(UserError, match=rf"^step 1: the loss is nan .* {end}"):
        finetune(config, tmp_path / "run", "dtype=fp16")
    assert "warning: val_loss is nan, never the best; dtype=fp16" in capfd.readouterr().out
    assert math.isfinite(finetune(config, tmp_path / "fp32", "epochs=1").train_loss[0])
