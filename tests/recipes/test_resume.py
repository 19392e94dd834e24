"""A run that is killed, stopped or goes wrong loses nothing, and goes on as if nothing had been."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qst_tune.data.batches.checked_rows import CheckedRows, row_numbers
from qst_tune.data.batches.survey import RowStore
from qst_tune.errors import UserError
from qst_tune.results.description import SIDE_NETWORK
from qst_tune.training.checkpoints import CheckpointStore
from qst_tune.training.run_log import RunSummary
from qst_tune.training.trainer import Trainer
from tests.support import kill_resume
from tests.support.checkpoints import (
    SIZES,
    Config,
    colour_rows,
    finetune_config,
    write_config,
    write_jsonl,
    write_model_directory,
)
from tests.support.recipe_runs import FinetuneResult, finetune, run_tune

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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    """Nine steps: three epochs of twelve rows, two batches of two a step."""
    config = finetune_config(root)
    write_jsonl(root / "train.jsonl", colour_rows(12))
    return {**config, "batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def whole(config: Config, root: Path) -> FinetuneResult:
    return finetune(config, root / "whole", *SETTINGS)


@pytest.fixture(scope="module")
def plain_whole(config: Config, root: Path) -> FinetuneResult:
    """With torch's own loss, which the losses of faults.py are."""
    return finetune(config, root / "plain_whole", *SETTINGS, PLAIN_LOSS, "batch_size_val=3")


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take as long as the rest of such a run."""
    monkeypatch.setattr(RunSummary, "_plot", lambda summary, path: None)


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
    for name in ("train_loss", "held_out_loss"):
        assert actual.summary[name] == expected.summary[name]


# Going on.


@pytest.mark.parametrize("step", [1, 5, NUM_STEPS])
def test_run_resumed_at_any_step_is_bit_identical(
    step: int, config: Config, whole: FinetuneResult, tmp_path: Path
) -> None:
    directory = cut(whole, tmp_path / "run", step)
    assert_identical(finetune(config, directory, *SETTINGS, RESUME), whole)


@pytest.mark.parametrize(
    "settings",
    [
        ["dataset.packed=True", "seed=null"],
        ["optimizer._component_=torch.optim.SGD", "optimizer.momentum=0.9", "num_workers=2"],
        ["enable_activation_checkpointing=True", "dtype=bf16", "model.downsample=lora"],
    ],
    ids=lambda settings: settings[0],
)
def test_resuming_is_exact_with_other_settings(
    settings: list[str], config: Config, tmp_path: Path
) -> None:
    settings = [*SETTINGS, *settings]
    run = finetune(config, tmp_path / "whole", *settings)
    step = steps_of(run.directory)[-1] // 2
    resumed = finetune(config, cut(run, tmp_path / "cut", step), *settings, RESUME)
    assert_identical(resumed, run)


@pytest.mark.slow  # compiles the optimizer: about 100 s
def test_resuming_is_exact_with_a_quantised_optimizer(config: Config, tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    # torchao quantises the states of matrices of 4096 numbers and more: a side network 64 wide.
    sizes = {**SIZES, "embed_dim": 128, "intermediate_dim": 192}
    write_model_directory(tmp_path / "model", sizes=sizes)
    config = {
        **config,
        "model": {**config["model"], **sizes, "reduction_factor": 2},
        "checkpointer": {**config["checkpointer"], "checkpoint_dir": str(tmp_path / "model")},
        "optimizer": {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-2},
    }
    settings = SETTINGS
    run = finetune(config, tmp_path / "whole", *settings)
    state = (run.directory / "checkpoints/step_00000004/state.json").read_text()
    assert "OptimState8bit" in state
    resumed = finetune(config, cut(run, tmp_path / "cut", 4), *settings, RESUME)
    assert_identical(resumed, run)


@pytest.mark.slow  # twice two processes: about 60 s on busy cores
def test_two_processes_resume_together(config: Config, tmp_path: Path) -> None:
    settings = [*SETTINGS, "gradient_accumulation_steps=1"]
    path = write_config(tmp_path / "config.yaml", config)
    launch = ["run", "--nproc_per_node", "2", "qst_finetune", "--config", path, *settings]

    def run(directory: Path, *overrides: str) -> FinetuneResult:
        result = run_tune(*launch, f"output_dir={directory}", *overrides, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return FinetuneResult(directory)

    both = run(tmp_path / "both")
    assert_identical(run(cut(both, tmp_path / "cut", 4), RESUME), both)
    alone = cut(both, tmp_path / "alone", 4)
    with pytest.raises(UserError, match="= 2 x 1 x 1 examples a step: it was 2 x 1 x 2"):
        finetune(config, alone, *settings, RESUME)


@pytest.mark.slow  # two processes: about 20 s on busy cores
def test_bad_row_ends_all_processes_before_the_first_step(
    config: Config, bad_rows: Path, tmp_path: Path
) -> None:
    """Each process reads all rows first; one that goes bad later is in test_distributed."""
    path = write_config(tmp_path / "config.yaml", config)
    result = run_tune(
        "run",
        "--nproc_per_node",
        "2",
        "qst_finetune",
        "--config",
        path,
        *SETTINGS,
        f"dataset.data_files={bad_rows}",
        f"output_dir={tmp_path / 'run'}",
        "shuffle=False",
        "gradient_accumulation_steps=1",
        cwd=tmp_path,
    )
    assert result.returncode != 0
    assert result.stderr.count("error: dataset: row 7 of") == 2  # one line a process
    assert not (tmp_path / "run").exists()


def test_two_runs_with_one_seed_and_any_number_of_workers_are_bit_identical(
    config: Config, whole: FinetuneResult, tmp_path: Path
) -> None:
    assert_identical(finetune(config, tmp_path / "again", *SETTINGS), whole)
    assert_identical(finetune(config, tmp_path / "workers", *SETTINGS, "num_workers=2"), whole)


def test_kill_at_a_random_moment_loses_nothing(tmp_path: Path) -> None:
    """Two of the fifty kills of kill_resume.py."""
    variant = "shuffled rows, accumulated"
    duration = kill_resume.uninterrupted(tmp_path, variant, tmp_path / "whole")
    expected = kill_resume.outcome(tmp_path / "whole")
    for moment in ({"seconds": duration / 2}, {"write": 57}):
        directory = tmp_path / next(iter(moment))
        kill_resume.kill_and_resume(tmp_path, variant, directory, **moment)
        assert kill_resume.outcome(directory) == expected
        assert not list(directory.rglob(".*")), "a half-written directory is left"


def test_newest_good_checkpoint_is_found_and_named(
    config: Config, whole: FinetuneResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = cut(whole, tmp_path / "run", 5)
    weights = directory / "checkpoints/step_00000005/side_network/side_network.safetensors"
    os.truncate(weights, 100)
    assert_identical(finetune(config, directory, *SETTINGS, RESUME), whole)
    log = caplog.text
    assert "step_00000005 is passed over: side_network/side_network.safetensors has changed" in log
    assert f"resuming from {directory}/checkpoints/step_00000004" in log
    assert (directory / "checkpoints/damaged_step_00000005").is_dir()


def test_resuming_without_a_checkpoint_begins_at_the_beginning(
    config: Config, whole: FinetuneResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert_identical(finetune(config, tmp_path / "run", *SETTINGS, RESUME), whole)
    assert "no checkpoint in" in caplog.text


def test_longer_run_goes_on_from_a_finished_one(
    config: Config, whole: FinetuneResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole.directory, tmp_path / "run")
    run = finetune(config, tmp_path / "run", *SETTINGS, RESUME, "epochs=4")
    assert len(run.train_loss) == NUM_STEPS + 3
    assert run.train_loss[:NUM_STEPS].tolist() == whole.train_loss.tolist()
    assert "changed since the checkpoint: epochs: 3 when saved, 4 now" in caplog.text


REFUSED = {
    "model.rank=8": ["model.rank: 4 when saved, 8 now", "belong to that model"],
    "batch_size=3": ["= 3 x 2 x 1 examples a step: it was 2 x 2 x 1", "so that it is 4 again"],
    "gradient_accumulation_steps=1": ["= 2 x 1 x 1 examples a step: it was 2 x 2 x 1"],
    "seed=1": ["seed: 0 when saved, 1 now", "order of the examples"],
    "shuffle=False": ["shuffle: True when saved, False now"],
    "tokenizer.max_seq_len=32": ["tokenizer.max_seq_len: 64 when saved, 32 now"],
    "dataset.packed=True": ["dataset.packed: None when saved, True now", "position in the data"],
    "optimizer.lr=0.5": ["optimizer.lr: 0.01 when saved, 0.5 now"],
    "max_steps_per_epoch=2": ["max_steps_per_epoch: None when saved, 2 now"],
    "dataset_val=null": ["dataset_val", "best step"],
    "hidden_state_cache=states": ["hidden_state_cache: None when saved, states now", "batches"],
}


@pytest.mark.parametrize("change", REFUSED)
def test_change_that_would_break_the_run_is_refused(
    change: str, config: Config, whole: FinetuneResult, tmp_path: Path
) -> None:
    directory = cut(whole, tmp_path / "run", 4)
    with pytest.raises(UserError) as error:
        finetune(config, directory, *SETTINGS, RESUME, change)
    missing = [part for part in REFUSED[change] if part not in str(error.value)]
    assert missing == [], error.value
    assert steps_of(directory) == [1, 2, 3, 4], "nothing is lost"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (colour_rows(13), "it has 12 training rows, this run 13"),
        (colour_rows(12, prefix="pray "), "the training rows have changed"),
    ],
)
def test_changed_rows_are_refused(
    rows: list[dict[str, str]],
    message: str,
    config: Config,
    whole: FinetuneResult,
    tmp_path: Path,
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=message):
        finetune(
            config,
            cut(whole, tmp_path / "run", 4),
            *SETTINGS,
            RESUME,
            f"dataset.data_files={path}",
        )


def test_rows_may_have_moved(config: Config, whole: FinetuneResult, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "moved.jsonl", colour_rows(12))
    directory = cut(whole, tmp_path / "run", 4)
    run = finetune(config, directory, *SETTINGS, RESUME, f"dataset.data_files={path}")
    assert_identical(run, whole)


def test_kept_hidden_states_may_have_moved_or_be_lost(config: Config, tmp_path: Path) -> None:
    kept = [f"hidden_state_cache={tmp_path / name}" for name in ("first", "second")]
    whole = finetune(config, tmp_path / "whole", *SETTINGS, kept[0])
    resumed = finetune(config, cut(whole, tmp_path / "cut", 4), *SETTINGS, kept[1], RESUME)
    assert_identical(resumed, whole)


def test_new_run_in_an_old_directory_sets_the_old_checkpoints_aside(
    config: Config, whole: FinetuneResult, tmp_path: Path
) -> None:
    shutil.copytree(whole.directory, tmp_path / "run")
    run = finetune(config, tmp_path / "run", *SETTINGS, "seed=1")
    assert run.weights_file.read_bytes() != whole.weights_file.read_bytes()
    assert CheckpointStore(run.directory / "checkpoints_before").steps() == steps_of(
        whole.directory
    )


def test_checkpoint_is_a_directory_without_a_pickle_whose_result_can_be_used(
    whole: FinetuneResult,
) -> None:
    directory = whole.directory / f"checkpoints/step_{NUM_STEPS:08}"
    assert {path.name for path in directory.iterdir()} == {
        "manifest.json",
        "state.json",
        "state.safetensors",
        "side_network",
    }
    result = {path.name: path.read_bytes() for path in (directory / "side_network").iterdir()}
    assert result.keys() == {path.name for path in whole.weights_file.parent.iterdir()}
    state = json.loads((directory / "state.json").read_text())
    assert state["progress"]["step"] == NUM_STEPS
    assert state["config"]["epochs"] == 3


# Stopping.


def faulty_loss(kind: str, directory: Path, **arguments: Any) -> list[str]:
    """Overrides: a loss of faults.py that goes wrong in the second half of the third step.

    Two batches of held-out rows come before the first step and two after the second, then the
    first half of the third.
    """
    call = 2 + 2 * 2 + 2 + 2
    settings = {"call": call, "marker": directory.with_suffix(".marker"), **arguments}
    pairs = [f"loss.{key}={value}" for key, value in settings.items()]
    return [*SETTINGS, f"loss._component_=tests.support.faults.{kind}", *pairs, "batch_size_val=3"]


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_signal_finishes_the_step_and_saves(
    name: str,
    status: int,
    config: Config,
    plain_whole: FinetuneResult,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "run"
    settings = faulty_loss("SignalledLoss", directory, signal_name=name)
    settings += ["save_every_n_steps=null"]
    handler = signal.getsignal(signal.Signals[name])
    with pytest.raises(SystemExit) as stopped:
        finetune(config, directory, *settings)
    assert stopped.value.code == status
    assert signal.getsignal(signal.Signals[name]) is handler
    captured = capfd.readouterr()
    assert f"{name}: finishing this step, then saving" in captured.err
    assert f"stopped by {name} after step 3 of {NUM_STEPS}" in captured.out
    assert steps_of(directory) == [2, 3]
    assert (directory / "side_network").is_dir()
    assert_identical(finetune(config, directory, *settings, RESUME), plain_whole)


@pytest.mark.parametrize("write", [0, 8])
def test_full_disk_is_one_line_and_leaves_the_last_good_checkpoint(
    write: int,
    config: Config,
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
            finetune(config, tmp_path / "run", *SETTINGS)
    assert "cannot write" in str(error.value)
    assert "step_00000005: No space left on device; the last good checkpoint is" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]
    assert_identical(finetune(config, tmp_path / "run", *SETTINGS, RESUME), whole)


# Losses and gradients that are not finite.


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
    config: Config,
    plain_whole: FinetuneResult,
    tmp_path: Path,
) -> None:
    directory = tmp_path / "run"
    settings = [*faulty_loss(kind, directory, **arguments), "save_every_n_steps=100"]
    with pytest.raises(UserError) as error:
        finetune(config, directory, *settings)
    assert str(error.value).startswith("step 3: the loss is ")
    assert what in str(error.value)
    rows = BATCHES_OF_EPOCH_0[4] + BATCHES_OF_EPOCH_0[5]
    assert f"(rows {', '.join(map(str, rows))} of the dataset)" in str(error.value)
    assert steps_of(directory) == [2], "the steps before it are saved"
    assert_identical(finetune(config, directory, *settings, RESUME), plain_whole)


def test_steps_that_are_not_finite_can_be_left_out(config: Config, tmp_path: Path) -> None:
    settings = faulty_loss("PoisonedLoss", tmp_path / "run", value="nan")
    run = finetune(config, tmp_path / "run", *settings, "skip_bad_steps=1")
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


def test_at_most_so_many_steps_are_left_out(config: Config, tmp_path: Path) -> None:
    # Step 3 is left out; it changed nothing, so the next one is not finite either.
    with pytest.raises(UserError, match=r"step 4: the loss is nan .* set skip_bad_steps="):
        finetune(config, tmp_path / "run", *SETTINGS, "optimizer.lr=1e30", "skip_bad_steps=1")


# Held-out data.


def test_best_step_is_the_one_that_is_exported(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    diverging = ["optimizer.lr=0.5", "lr_scheduler.num_warmup_steps=9", "clip_grad_norm=null"]
    run = finetune(config, tmp_path / "run", *SETTINGS, *diverging, "keep_last_n_checkpoints=1")
    losses = {step: loss for step, loss in run.held_out_loss.items() if step > 0}
    best = min(losses, key=losses.__getitem__)
    assert best < NUM_STEPS
    exported = run.weights_file.read_bytes()
    store = CheckpointStore(run.directory / "checkpoints")
    assert store.steps() == [best, NUM_STEPS], "the best one is never deleted"
    for step in store.steps():
        saved = store.checkpoint(step).directory / "side_network" / SIDE_NETWORK.weights_file
        assert (saved.read_bytes() == exported) == (step == best)
    assert f"step {best} of {NUM_STEPS}, the best of the validated steps" in capfd.readouterr().out


def test_training_stops_when_validation_gets_no_better(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [
        *SETTINGS,
        "run_val_every_n_steps=1",
        "early_stopping_patience=2",
        "optimizer.lr=0.5",
    ]
    settings += ["lr_scheduler.num_warmup_steps=9", "clip_grad_norm=null"]
    run = finetune(config, tmp_path / "run", *settings)
    losses = list(run.held_out_loss.values())[1:]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 2 < NUM_STEPS
    assert "no better for 2 validations" in capfd.readouterr().out
    again = finetune(config, tmp_path / "run", *settings, RESUME)
    assert again.held_out_loss == run.held_out_loss, "it is over, also after resuming"


def test_fraction_of_the_rows_is_held_out_and_never_trained_on(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders = []
    fit = Trainer.fit

    def spy(trainer: Trainer) -> None:
        loaders.append((trainer.train_data, trainer.validation_data))
        fit(trainer)

    monkeypatch.setattr(Trainer, "fit", spy)
    run = finetune(config, tmp_path / "run", "dataset_val=null", "val_fraction=0.3", "epochs=2")
    assert set(run.held_out_loss) == {0, 2, 4}
    ((train, held_out),) = loaders
    trained = {
        i for epoch in range(2) for b in train.rows(epoch) for i in row_numbers(train.dataset, b)
    }
    measured = {i for b in held_out.rows() for i in row_numbers(held_out.dataset, b)}
    assert len(measured) == 4  # of 12
    assert not trained & measured


def test_each_epoch_ends_with_a_validation(config: Config, tmp_path: Path) -> None:
    run = finetune(config, tmp_path / "run", "epochs=3")
    assert list(run.held_out_loss) == [0, 3, 6, 9]


def test_lost_best_checkpoint_is_told_and_another_becomes_the_best(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = [*SETTINGS, "optimizer.lr=0.5", "lr_scheduler.num_warmup_steps=9"]
    finetune(config, tmp_path / "run", *settings, "epochs=2", "lr_scheduler=null")
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    state = json.loads((store.checkpoint(6).directory / "state.json").read_text())
    best = state["progress"]["best_step"]
    assert best < 6
    (store.checkpoint(best).directory / "manifest.json").unlink()
    run = finetune(config, tmp_path / "run", *settings, "epochs=3", "lr_scheduler=null", RESUME)
    assert f"the checkpoint of step {best}, the best so far, is lost: " in caplog.text
    assert run.summary["best_step"] > 6
    assert run.weights_file.exists()


def test_other_validation_rows_are_refused(config: Config, tmp_path: Path) -> None:
    finetune(config, tmp_path / "run", *SETTINGS, "epochs=1")
    write_jsonl(tmp_path / "other.jsonl", colour_rows(5)[1:] + colour_rows(9)[8:])
    other = f"dataset_val.data_files={tmp_path / 'other.jsonl'}"
    with pytest.raises(UserError, match="the held-out rows have changed"):
        finetune(config, tmp_path / "run", *SETTINGS, other, RESUME)


# Rows that cannot be used.


@pytest.fixture
def bad_rows(tmp_path: Path) -> Path:
    """Row 7 of 40, line 9 of the file, has no answer."""
    lines = [json.dumps(row) for row in colour_rows(40)]
    lines[7] = json.dumps({"input": "what is the colour of box 7"})
    lines.insert(2, "")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_bad_row_is_named_before_the_first_step(
    bad_rows: Path, config: Config, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        finetune(config, tmp_path / "run", f"dataset.data_files={bad_rows}")
    message = str(error.value)
    assert message.startswith(f"dataset: row 7 of {bad_rows} (line 9) cannot be used: "), message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def unkept_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read again for each batch, as those of a dataset that memory cannot hold."""
    monkeypatch.setattr(RowStore, "get", lambda store, index: None)


def fail_after(
    monkeypatch: pytest.MonkeyPatch, name: str, num_reads: int
) -> Callable[[CheckedRows, int], Any]:
    """Let reading a row of a dataset fail from some read on; returns what worked."""
    read = CheckedRows.__getitem__
    reads = iter(range(10**6))

    def fail_late(dataset: CheckedRows, index: int) -> Any:
        if dataset.name == name and next(reads) >= num_reads:
            raise UserError(f"{name}: row 3 cannot be used")
        return read(dataset, index)

    monkeypatch.setattr(CheckedRows, "__getitem__", fail_late)
    return read


@pytest.mark.usefixtures("unkept_rows")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_row_that_goes_bad_under_the_run_costs_no_complete_step(
    num_workers: int, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_after(monkeypatch, "dataset", 12 + 6)  # all are read before the first step
    settings = [*SETTINGS, f"num_workers={num_workers}", "save_every_n_steps=100"]
    with pytest.raises(UserError, match=r"^dataset: row 3 cannot be used$"):
        finetune(config, tmp_path / "run", *settings)
    assert steps_of(tmp_path / "run") == [1]


@pytest.mark.usefixtures("unkept_rows")
def test_bad_held_out_row_costs_no_step_either(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = fail_after(monkeypatch, "dataset_val", 5 + 5 + 3)  # survey, first and second validation
    with pytest.raises(UserError, match=r"^dataset_val: row 3"):
        finetune(config, tmp_path / "run", *SETTINGS, "save_every_n_steps=100")
    assert steps_of(tmp_path / "run") == [2]
    monkeypatch.setattr(CheckedRows, "__getitem__", read)
    run = finetune(config, tmp_path / "run", *SETTINGS, RESUME)
    assert 2 in run.held_out_loss, "the validation that failed is made up for"


def test_bad_row_can_be_skipped(bad_rows: Path, config: Config, tmp_path: Path) -> None:
    settings = [f"dataset.data_files={bad_rows}", "on_bad_row=skip"]
    run = finetune(config, tmp_path / "run", *settings)
    assert len(run.train_loss) == 9  # of 39 rows, 4 a step
    packed = finetune(config, tmp_path / "packed", *settings, "dataset.packed=True")
    assert packed.train_loss.isfinite().all()


def test_bad_row_of_a_packed_dataset_is_named(
    bad_rows: Path, config: Config, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"^dataset: row 7 of .* \(line 9\) cannot be used: "):
        finetune(
            config,
            tmp_path / "run",
            f"dataset.data_files={bad_rows}",
            "dataset.packed=True",
        )
