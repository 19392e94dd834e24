"""What a run reports of itself, and where it refuses to go on."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qst_tune.errors import UserError
from tests.support.checkpoints import Config, colour_rows, finetune_config, write_jsonl
from tests.support.recipe_runs import finetune


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
