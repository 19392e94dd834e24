"""Validation chooses the step that is exported, and when a run stops."""

from pathlib import Path

import pytest

from qst_tune.data.batches.checked_rows import row_numbers
from qst_tune.results.description import SIDE_NETWORK
from qst_tune.training.checkpoints import CheckpointStore
from qst_tune.training.trainer import Trainer
from tests.support.checkpoints import (
    Config,
)
from tests.support.nine_steps import NUM_STEPS, RESUME, SETTINGS
from tests.support.recipe_runs import finetune


def test_best_step_is_the_one_that_is_exported(
    nine_steps: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    diverging = ["optimizer.lr=0.5", "lr_scheduler.num_warmup_steps=9", "clip_grad_norm=null"]
    run = finetune(nine_steps, tmp_path / "run", *SETTINGS, *diverging, "keep_last_n_checkpoints=1")
    losses = {step: loss for step, loss in run.val_loss.items() if step > 0}
    best = min(losses, key=losses.__getitem__)
    assert best < NUM_STEPS
    exported = run.weights_file.read_bytes()
    store = CheckpointStore(run.directory / "checkpoints")
    assert store.steps() == [best, NUM_STEPS], "the best one is never deleted"
    for step in store.steps():
        saved = store.path(step) / "side_network" / SIDE_NETWORK.weights_file
        assert (saved.read_bytes() == exported) == (step == best)
    assert f"step {best} of {NUM_STEPS}, the best of the validated steps" in capfd.readouterr().out


def test_training_stops_when_validation_gets_no_better(
    nine_steps: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [
        *SETTINGS,
        "run_val_every_n_steps=1",
        "early_stopping_patience=2",
        "optimizer.lr=0.5",
    ]
    settings += ["lr_scheduler.num_warmup_steps=9", "clip_grad_norm=null"]
    run = finetune(nine_steps, tmp_path / "run", *settings)
    losses = list(run.val_loss.values())[1:]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 2 < NUM_STEPS
    assert "no better for 2 validations" in capfd.readouterr().out
    again = finetune(nine_steps, tmp_path / "run", *settings, RESUME)
    assert again.val_loss == run.val_loss, "it is over, also after resuming"


def test_fraction_of_the_rows_is_held_out_and_never_trained_on(
    nine_steps: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders = []
    fit = Trainer.fit

    def spy(trainer: Trainer) -> None:
        loaders.append((trainer.train_data, trainer.validation_data))
        fit(trainer)

    monkeypatch.setattr(Trainer, "fit", spy)
    run = finetune(nine_steps, tmp_path / "run", "dataset_val=null", "val_fraction=0.3", "epochs=2")
    assert set(run.val_loss) == {0, 2, 4}
    ((train, held_out),) = loaders
    trained = {
        i for epoch in range(2) for b in train.rows(epoch) for i in row_numbers(train.dataset, b)
    }
    measured = {i for b in held_out.rows() for i in row_numbers(held_out.dataset, b)}
    assert len(measured) == 4  # of 12
    assert not trained & measured


def test_each_epoch_ends_with_a_validation(nine_steps: Config, tmp_path: Path) -> None:
    run = finetune(nine_steps, tmp_path / "run", "epochs=3")
    assert list(run.val_loss) == [0, 3, 6, 9]


def test_damaged_best_checkpoint_is_set_aside_and_the_next_best_takes_its_place(
    nine_steps: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [*SETTINGS, "optimizer.lr=0.5", "lr_scheduler=null"]
    settings += ["run_val_every_n_steps=1", "save_every_n_steps=1", "keep_last_n_checkpoints=null"]
    before = finetune(nine_steps, tmp_path / "run", *settings, "epochs=2")
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    best, second = sorted(range(1, 7), key=before.val_loss.__getitem__)[:2]
    (store.path(best) / "side_network" / "README.md").write_text("x")
    run = finetune(nine_steps, tmp_path / "run", *settings, "epochs=2", RESUME)
    assert not store.path(best).exists()
    aside = store.directory / f"damaged_step_{best:08}"
    assert (aside / "side_network" / "README.md").read_text() == "x", "kept for its owner"
    assert run.summary["best_step"] == second
    assert (
        run.weights_file.read_bytes()
        == next((store.path(second) / "side_network").glob("*.safetensors")).read_bytes()
    )
    out = capfd.readouterr().out
    assert (
        f"warning: the checkpoint of step {best}, the best so far, is damaged (side_network/"
        f"README.md has changed since it was written) and is now {aside}; step {second} is "
        "the next best" in out
    )
    assert f"step {second} of 6, the best step whose checkpoint is not damaged (" in out
