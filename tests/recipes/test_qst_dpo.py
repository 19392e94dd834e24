"""DPO through the real `tune`, on pairs that can be learnt by heart."""

from pathlib import Path

import pytest

from tests.support.checkpoints import Config, finetune_config, write_config, write_jsonl
from tests.support.recipe_runs import FinetuneResult, run_tune


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def write_pairs(path: Path, count: int) -> Path:
    """Blue is always better than red."""
    questions = [f"what is the colour of box {i}" for i in range(count)]
    pairs = [
        {"chosen": conversation(q, "it is blue"), "rejected": conversation(q, "it is red")}
        for q in questions
    ]
    return write_jsonl(path, pairs)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dpo")


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    dataset = {
        "_component_": "torchtune.datasets.preference_dataset",
        "source": "json",
        "data_files": str(write_pairs(root / "pairs.jsonl", 20)),
        "cache_dir": str(root / "cache"),
    }
    return {
        **finetune_config(root),
        "dataset": dataset,
        "dataset_val": None,
        "val_fraction": 0.2,
        "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"},
    }


@pytest.fixture(scope="module")
def trained(root: Path, config: Config) -> FinetuneResult:
    path = write_config(root / "config.yaml", config)
    result = run_tune("run", "qst_dpo", "--config", path, "epochs=4", cwd=root)
    assert result.returncode == 0, result.stderr
    return FinetuneResult(root / "run")


def test_it_learns_which_answer_is_better(trained: FinetuneResult) -> None:
    metrics = trained.summary["metrics"]
    assert trained.held_out_loss[0] == pytest.approx(0.6931, abs=1e-4), "no opinion before"
    assert metrics["reward_accuracy"]["16"] == 1.0
    assert metrics["reward_margin"]["16"] > 0
    assert trained.held_out_loss[16] < 0.6


def test_result_is_a_side_network_like_any_other(
    trained: FinetuneResult, config: Config, root: Path
) -> None:
    path = write_config(root / "again.yaml", {**config, "output_dir": str(root / "run")})
    result = run_tune(
        "run", "qst_dpo", "--config", path, "epochs=4", "resume_from_checkpoint=True", cwd=root
    )
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout + result.stderr
    assert (trained.directory / "side_network" / "README.md").exists()


def test_mistake_is_one_line(config: Config, root: Path) -> None:
    path = write_config(root / "wrong.yaml", {**config, "output_dir": str(root / "wrong")})
    result = run_tune(
        *("run", "qst_dpo", "--config", path, "loss._component_=torch.nn.CrossEntropyLoss"),
        cwd=root,
    )
    assert result.returncode == 2
    assert sum("does not learn from pairs" in line for line in result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
    assert not (root / "wrong").exists()
