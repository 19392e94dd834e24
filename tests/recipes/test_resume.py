"""A resumed run ends as if it had never been stopped; what would change it is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest

from qst_tune.errors import UserError
from qst_tune.training.checkpoints import CheckpointStore
from tests.support import kill_resume
from tests.support.checkpoints import (
    SIZES,
    Config,
    colour_rows,
    write_config,
    write_jsonl,
    write_model_directory,
)
from tests.support.nine_steps import NUM_STEPS, RESUME, SETTINGS, assert_identical, cut, steps_of
from tests.support.recipe_runs import FinetuneResult, finetune, run_tune


@pytest.mark.parametrize(
    "settings",
    [
        ["dataset.packed=True", "seed=null"],
        pytest.param(
            ["optimizer._component_=torch.optim.SGD", "optimizer.momentum=0.9", "num_workers=2"],
            marks=pytest.mark.slow,
        ),
        ["enable_activation_checkpointing=True", "dtype=bf16", "model.downsample=lora"],
    ],
    ids=lambda settings: settings[0],
)
def test_resuming_is_exact_with_other_settings(
    settings: list[str], nine_steps: Config, tmp_path: Path
) -> None:
    settings = [*SETTINGS, *settings]
    run = finetune(nine_steps, tmp_path / "whole", *settings)
    step = steps_of(run.directory)[-1] // 2
    resumed = finetune(nine_steps, cut(run, tmp_path / "cut", step), *settings, RESUME)
    assert_identical(resumed, run)


@pytest.mark.slow  # compiles the optimizer: about 100 s
def test_resuming_is_exact_with_a_quantised_optimizer(nine_steps: Config, tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    # torchao quantises the states of matrices of 4096 numbers and more: a side network 64 wide.
    sizes = {**SIZES, "embed_dim": 128, "intermediate_dim": 192}
    write_model_directory(tmp_path / "model", sizes=sizes)
    nine_steps = {
        **nine_steps,
        "model": {**nine_steps["model"], **sizes, "reduction_factor": 2},
        "checkpointer": {**nine_steps["checkpointer"], "checkpoint_dir": str(tmp_path / "model")},
        "optimizer": {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-2},
    }
    settings = SETTINGS
    run = finetune(nine_steps, tmp_path / "whole", *settings)
    state = (run.directory / "checkpoints/step_00000004/state.json").read_text()
    assert "OptimState8bit" in state
    resumed = finetune(nine_steps, cut(run, tmp_path / "cut", 4), *settings, RESUME)
    assert_identical(resumed, run)


@pytest.mark.slow  # twice two processes: about 60 s on busy cores
def test_two_processes_resume_together(nine_steps: Config, tmp_path: Path) -> None:
    settings = [*SETTINGS, "gradient_accumulation_steps=1"]
    path = write_config(tmp_path / "config.yaml", nine_steps)
    launch = ["run", "--nproc_per_node", "2", "qst_finetune", "--config", path, *settings]

    def run(directory: Path, *overrides: str) -> FinetuneResult:
        result = run_tune(*launch, f"output_dir={directory}", *overrides, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return FinetuneResult(directory)

    both = run(tmp_path / "both")
    assert_identical(run(cut(both, tmp_path / "cut", 4), RESUME), both)
    alone = cut(both, tmp_path / "alone", 4)
    with pytest.raises(UserError, match="= 2 x 1 x 1 examples a step: it was 2 x 1 x 2"):
        finetune(nine_steps, alone, *settings, RESUME)


def test_any_number_of_workers_gives_the_same_bits(
    nine_steps: Config, whole: FinetuneResult, tmp_path: Path
) -> None:
    assert_identical(finetune(nine_steps, tmp_path / "workers", *SETTINGS, "num_workers=2"), whole)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(
            name, marks=() if name == "LoRA and dropout, accumulated" else pytest.mark.slow
        )
        for name in kill_resume.VARIANTS
    ],
)
def test_kill_at_a_random_moment_loses_nothing(variant: str, tmp_path: Path) -> None:
    """Two of the fifty kills of kill_resume.py."""
    duration = kill_resume.uninterrupted(tmp_path, variant, tmp_path / "whole")
    expected = kill_resume.outcome(tmp_path / "whole")
    for moment in ({"seconds": duration / 2}, {"write": 57}):
        directory = tmp_path / next(iter(moment))
        kill_resume.kill_and_resume(tmp_path, variant, directory, **moment)
        assert kill_resume.outcome(directory) == expected
        assert not list(directory.rglob(".*")), "a half-written directory is left"


def test_newest_good_checkpoint_is_found_and_named(
    nine_steps: Config, whole: FinetuneResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = cut(whole, tmp_path / "run", 5)
    weights = directory / "checkpoints/step_00000005/side_network/side_network.safetensors"
    os.truncate(weights, 100)
    assert_identical(finetune(nine_steps, directory, *SETTINGS, RESUME), whole)
    log = caplog.text
    assert "step_00000005 is passed over: side_network/side_network.safetensors has changed" in log
    assert f"resuming from {directory}/checkpoints/step_00000004" in log
    assert (directory / "checkpoints/damaged_step_00000005").is_dir()


def test_resuming_without_a_checkpoint_begins_at_the_beginning(
    nine_steps: Config, whole: FinetuneResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert_identical(finetune(nine_steps, tmp_path / "run", *SETTINGS, RESUME), whole)
    assert "no checkpoint in" in caplog.text


def test_longer_run_goes_on_from_a_finished_one(
    nine_steps: Config, whole: FinetuneResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole.directory, tmp_path / "run")
    run = finetune(nine_steps, tmp_path / "run", *SETTINGS, RESUME, "epochs=4")
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
    change: str, nine_steps: Config, whole: FinetuneResult, tmp_path: Path
) -> None:
    directory = cut(whole, tmp_path / "run", 4)
    with pytest.raises(UserError) as error:
        finetune(nine_steps, directory, *SETTINGS, RESUME, change)
    missing = [part for part in REFUSED[change] if part not in str(error.value)]
    assert missing == [], error.value
    assert steps_of(directory) == [1, 2, 3, 4], "nothing is lost"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (colour_rows(13), "its training set has 12 examples, this run's 13"),
        (colour_rows(12, prefix="pray "), "the training set has changed"),
    ],
)
def test_changed_rows_are_refused(
    rows: list[dict[str, str]],
    message: str,
    nine_steps: Config,
    whole: FinetuneResult,
    tmp_path: Path,
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=message):
        finetune(
            nine_steps,
            cut(whole, tmp_path / "run", 4),
            *SETTINGS,
            RESUME,
            f"dataset.data_files={path}",
        )


def test_rows_may_have_moved(nine_steps: Config, whole: FinetuneResult, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "moved.jsonl", colour_rows(12))
    directory = cut(whole, tmp_path / "run", 4)
    run = finetune(nine_steps, directory, *SETTINGS, RESUME, f"dataset.data_files={path}")
    assert_identical(run, whole)


def test_kept_hidden_states_may_have_moved_or_be_lost(nine_steps: Config, tmp_path: Path) -> None:
    kept = [f"hidden_state_cache={tmp_path / name}" for name in ("first", "second")]
    whole = finetune(nine_steps, tmp_path / "whole", *SETTINGS, kept[0])
    resumed = finetune(nine_steps, cut(whole, tmp_path / "cut", 4), *SETTINGS, kept[1], RESUME)
    assert_identical(resumed, whole)


def test_new_run_in_an_old_directory_sets_the_old_checkpoints_aside(
    nine_steps: Config, whole: FinetuneResult, tmp_path: Path
) -> None:
    shutil.copytree(whole.directory, tmp_path / "run")
    run = finetune(nine_steps, tmp_path / "run", *SETTINGS, "seed=1")
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


def test_other_validation_rows_are_refused(nine_steps: Config, tmp_path: Path) -> None:
    finetune(nine_steps, tmp_path / "run", *SETTINGS, "epochs=1")
    write_jsonl(tmp_path / "other.jsonl", colour_rows(5)[1:] + colour_rows(9)[8:])
    other = f"dataset_val.data_files={tmp_path / 'other.jsonl'}"
    with pytest.raises(UserError, match="the validation set has changed"):
        finetune(nine_steps, tmp_path / "run", *SETTINGS, other, RESUME)
