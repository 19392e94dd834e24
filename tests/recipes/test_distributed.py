"""Several processes train what one does, with the backbone whole or sharded, and fail together."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qst_tune.recipes import peqa_finetune, qst_dpo, qst_finetune
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException

from tests.support import kill_rank, kill_resume
from tests.support.checkpoints import (
    SIZES,
    Config,
    colour_rows,
    finetune_config,
    write_config,
    write_jsonl,
)
from tests.support.ranks import finetune_on, unused_port
from tests.support.recipe_runs import FinetuneResult, merged, one_thread, run_tune

# 40 rows, 12 to 43 tokens long, in 5 steps of 8 an epoch; 7 validation rows are dealt unevenly.
NUM_ROWS, ROWS_PER_STEP, NUM_STEPS = 40, 8, 20
SETTINGS = [
    "epochs=4",
    "run_val_every_n_steps=7",
    "clip_grad_norm=1.0",
    "keep_last_n_checkpoints=null",
]
RECIPES = {
    **{"qst": qst_finetune, "peqa": peqa_finetune, "dpo": qst_dpo},
    **{"dial": qst_finetune, "dial dpo": qst_dpo},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distributed")
    finetune_config(root)
    rows = colour_rows(NUM_ROWS)
    for index, row in enumerate(rows):
        row["output"] += " or so" * (index % 5)
    write_jsonl(root / "train.jsonl", rows)
    write_jsonl(root / "val.jsonl", colour_rows(7, prefix="tell me "))
    pairs = [
        {
            "chosen": _conversation(row["input"], row["output"]),
            "rejected": _conversation(row["input"], "no idea" + "?" * (i % 4)),
        }
        for i, row in enumerate(rows)
    ]
    write_jsonl(root / "pairs.jsonl", pairs)  # type: ignore[arg-type]
    return root


def _conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def config_of(root: Path, method: str = "qst") -> Config:
    config = finetune_config(root)
    if method == "peqa":
        model = {"_component_": "qst_tune.models.peqa_llama3_2", **SIZES, "group_size": 32}
        config["model"] = model
        config["optimizer"]["lr"] = 1e-4
    if "dial" in method:
        config["model"] |= {"lora_layers": 2, "lora_rank": 4}
    if "dpo" in method:
        config["loss"] = {"_component_": "torchtune.rlhf.loss.DPOLoss"}
        config["dataset"] = {
            "_component_": "torchtune.datasets.preference_dataset",
            "source": "json",
            "data_files": str(root / "pairs.jsonl"),
            "cache_dir": str(root / "cache"),
        }
        config |= {"dataset_val": None, "val_fraction": 0.1}
    return config


def trained(method: str, result: FinetuneResult) -> dict[str, torch.Tensor]:
    name = "scales/scales" if method == "peqa" else "side_network/side_network"
    return load_file(result.directory / f"{name}.safetensors")


_alone: dict[str, FinetuneResult] = {}


def alone(root: Path, method: str) -> FinetuneResult:
    """The run of one process, made once."""
    if method not in _alone:
        cfg = merged(
            config_of(root, method),
            f"output_dir={root / method}",
            f"batch_size={ROWS_PER_STEP}",
            *SETTINGS,
        )
        with one_thread():
            RECIPES[method].main(cfg)
        _alone[method] = FinetuneResult(root / method)
    return _alone[method]


def assert_same_run(method: str, run: FinetuneResult, expected: FinetuneResult) -> None:
    """Equal to 1e-6 of each loss, which is two of its fp32 digits' units.

    The order of sums differs by rounding, which AdamW's division by small numbers makes larger in
    the tensors: 2e-5 of an lr of 1e-2 was seen after 20 steps.
    """
    assert len(run.train_loss) == (16 if "dpo" in method else NUM_STEPS)  # 4 pairs are held out
    # DPO's losses fall to thousandths, which are sums of log-probabilities of some tens.
    torch.testing.assert_close(run.train_loss, expected.train_loss, rtol=1e-6, atol=1e-8)
    assert run.val_loss == pytest.approx(expected.val_loss, rel=1e-6, abs=1e-8)
    torch.testing.assert_close(trained(method, run), trained(method, expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "size", "sharding"),
    [
        ("qst", 2, "full"),
        ("peqa", 2, "full"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("qst", 4, "full"),
                ("qst", 4, "null"),
                ("peqa", 4, "full"),
                ("peqa", 2, "null"),
                ("dpo", 2, "full"),
                ("dial", 2, "full"),
                ("dial", 4, "null"),
                ("dial dpo", 2, "full"),
                ("dial dpo", 2, "null"),
            ]
        ),
    ],
)
def test_processes_train_what_one_trains_with_the_same_batch(
    method: str, size: int, sharding: str, root: Path, tmp_path: Path
) -> None:
    expected = alone(root, method)
    run = finetune_on(
        size,
        config_of(root, method),
        tmp_path,
        f"batch_size={ROWS_PER_STEP // size}",
        f"backbone_sharding={sharding}",
        # Two processes also recompute: in PEQA's case, layers that are gathered for it.
        f"enable_activation_checkpointing={size == 2}",
        *SETTINGS,
        recipe=RECIPES[method],
    )
    assert_same_run(method, run, expected)


def cut_at(run: FinetuneResult, directory: Path, step: int) -> Path:
    """A run as it was after a step."""
    shutil.copytree(run.directory, directory)
    for path in (directory / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    for name in ("side_network", "summary.json"):
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return directory


def test_run_goes_on_with_another_number_of_processes(root: Path, tmp_path: Path) -> None:
    expected = alone(root, "qst")
    run = finetune_on(
        2,
        config_of(root),
        cut_at(expected, tmp_path / "run", 10),
        *SETTINGS,
        "resume_from_checkpoint=True",
        "backbone_sharding=full",
        "batch_size=2",
        "gradient_accumulation_steps=2",
    )
    assert_same_run("qst", run, expected)
    assert run.train_loss[:10].tolist() == expected.train_loss[:10].tolist(), "not resumed"


@pytest.mark.parametrize("bad", [pytest.param("train", marks=pytest.mark.slow), "val"])
def test_bad_row_of_one_process_ends_a_sharded_run_with_one_line_and_a_checkpoint(
    bad: str, root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The other process waits for its part of the weights, and then for the sum.

    All rows are read before the run, so this one goes bad under it: row 5, of the second process.
    """
    name = "dataset" if bad == "train" else "dataset_val"
    config = {
        **config_of(root),
        name: {"_component_": "tests.support.faults.FadingRows", "bad": 5},
    }
    with pytest.raises(ProcessExitedException) as exited:
        finetune_on(
            2,
            config,
            tmp_path / "run",
            "batch_size=1",
            "backbone_sharding=full",
            "shuffle=False",
            "save_every_n_steps=1",
        )
    assert exited.value.exit_code == 2
    assert capfd.readouterr().err.count("error: ") == 1
    steps = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert steps == (["step_00000001", "step_00000002"] if bad == "train" else [])


@pytest.mark.slow  # four starts of two processes: minutes on busy cores
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_ends_the_run_and_a_second_start_finishes_it_bit_for_bit(
    rank: int, tmp_path: Path
) -> None:
    """Two kills of kill_rank.py, in the middle of the run."""
    duration = kill_rank.whole_run(tmp_path, tmp_path / "whole")
    where = kill_rank.kill_one(tmp_path, tmp_path / "killed", rank, duration / 2)
    assert where is None or "ended with [2], said why" in where
    assert kill_resume.outcome(tmp_path / "killed") == kill_resume.outcome(tmp_path / "whole")


@pytest.mark.slow  # two processes that start twice: a minute on busy cores
def test_torchrun_starts_a_killed_run_again_where_it_was(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    path = write_config(tmp_path / "config.yaml", config_of(root))
    result = run_tune(
        *("run", "--nproc_per_node", "2", "--max-restarts", "1", "qst_finetune"),
        *("--config", path, *SETTINGS, f"output_dir={tmp_path / 'run'}"),
        *("batch_size=4", "backbone_sharding=full", "save_every_n_steps=1"),
        "loss._component_=tests.support.faults.SignalledLoss",
        *("loss.call=15", f"loss.marker={tmp_path / 'killed'}", "loss.signal_name=SIGKILL"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "killed").exists()
    assert "resuming from" in result.stderr + result.stdout
    assert_same_run("qst", FinetuneResult(tmp_path / "run"), alone(root, "qst"))


@pytest.mark.slow  # two agents with a process each: a minute on busy cores
def test_two_nodes_meet_by_the_documented_command(root: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.yaml", config_of(root))
    endpoint = f"localhost:{unused_port()}"
    command = [
        *(sys.executable, "-m", "torchtune._cli.tune", "run", "--nnodes", "2"),
        *("--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint),
        *("--rdzv_id", "1", "qst_finetune", "--config", str(path), *SETTINGS),
        *(f"output_dir={tmp_path / 'run'}", "batch_size=4", "backbone_sharding=full"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        told = [agent.communicate(timeout=300)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], told
    assert_same_run("qst", FinetuneResult(tmp_path / "run"), alone(root, "qst"))
