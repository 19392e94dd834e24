"""Metrics, predictions and settings of classifiers; the rest is in test_methods.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qst_tune.recipes import qst_classify, qst_finetune
from transformers import AutoTokenizer

from qst_tune import QSTForSequenceClassification
from qst_tune.errors import UserError
from tests.support.checkpoints import Config, write_jsonl
from tests.support.methods import LABELS, METHODS, TEMPLATE
from tests.support.recipe_runs import FinetuneResult, finetune, merged

CLASSIFIER = METHODS["classifier"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classification")


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    return CLASSIFIER.config(root)


@pytest.fixture(scope="module")
def trained(root: Path) -> FinetuneResult:
    return CLASSIFIER.run(root, root / "run", "epochs=10")


def test_it_learns_and_the_summary_has_every_metric(trained: FinetuneResult) -> None:
    metrics = trained.summary["metrics"]
    assert metrics["accuracy"]["40"] == metrics["f1"]["40"] == 1.0
    assert metrics["accuracy"]["0"] < 1.0
    assert trained.val_loss[40] < trained.val_loss[0]
    card = (trained.directory / "side_network" / "README.md").read_text()
    assert f"| accuracy at step {trained.summary['best_step']} | 1 |" in card
    assert "tune run qst_classify " in card


def test_metrics_are_logged(trained: FinetuneResult) -> None:
    (log,) = (trained.directory / "logs").iterdir()
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("Step 40 | acc")]
    assert "accuracy:1.0" in line
    assert "val_loss:" in line


def classify(config: Config, trained: FinetuneResult, *overrides: str) -> list[dict[str, Any]]:
    directory = trained.directory.parent / "classified"
    cfg = merged(
        {**config, "side_network": str(trained.directory / "side_network"), "rows": None},
        f"output_dir={directory}",
        *overrides,
    )
    qst_classify.main(cfg)
    return [json.loads(line) for line in (directory / "predictions.jsonl").read_text().splitlines()]


def test_the_saved_directory_alone_answers_new_rows(
    trained: FinetuneResult, root: Path, config: Config
) -> None:
    """The head is in it, the rows need no label, and they keep their order and columns."""
    dev = [json.loads(line) for line in (root / "dev.jsonl").read_text().splitlines()]
    columns = {"id": "i", "day": "2024-02-29"}  # read as a date, which JSON has not
    rows = write_jsonl(root / "new.jsonl", [{"text": row["text"], **columns} for row in dev])
    found = classify(config, trained, f"rows={rows}")
    assert [row["prediction"] for row in found] == [row["label"] for row in dev]
    assert [row["text"] for row in found] == [row["text"] for row in dev]
    assert all(row["day"].startswith("2024-02-29") for row in found)
    assert all(row["id"] == "i" and 0.5 <= row["probability"] <= 1 for row in found)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rows={root}/absent.jsonl"], "does not exist or is empty"),
        (["rows={root}/train.jsonl"], "has no column 'text'"),
        (["rows={root}/dev.jsonl", "model.num_labels=3"], "tensors differ.* score.weight"),
        (["rows={root}/dev.jsonl", "batch_size=0"], "batch_size=0 must be a whole number of at"),
    ],
)
def test_a_mistake_when_classifying_is_one_line(
    overrides: list[str], message: str, trained: FinetuneResult, root: Path, config: Config
) -> None:
    with pytest.raises(UserError, match=message) as error:
        classify(config, trained, *(text.format(root=root) for text in overrides))
    assert "\n" not in str(error.value)


def test_rows_are_read_as_one_dataset_says(
    trained: FinetuneResult, root: Path, config: Config
) -> None:
    both = {**config, "dataset": [config["dataset"], config["dataset_val"]]}
    with pytest.raises(UserError, match=r"^dataset: name one, whose template and labels"):
        classify(both, trained, f"rows={root / 'dev.jsonl'}")


def test_row_that_is_too_long_for_the_model_is_named(root: Path, config: Config) -> None:
    path = write_jsonl(root / "long.jsonl", [{"text": "a" * 500, "label": "red"}])
    settings = [f"dataset.data_files={path}", f"output_dir={root / 'long'}"]
    settings += ["tokenizer.max_seq_len=null"]
    with pytest.raises(
        UserError, match=r"dataset: row 0 of .*long\.jsonl \(line 1\) cannot be used: "
    ):
        qst_finetune.main(merged(config, *settings))


def test_a_regression_learns_its_scores(root: Path, config: Config) -> None:
    scores = [{"text": "abx"[: i % 3 + 1], "label": float(i % 3)} for i in range(12)]
    path = write_jsonl(root / "scores.jsonl", scores)
    changes = {"data_files": str(path), "labels": None, "metrics": ["pearson", "spearman"]}
    regression = {
        **config,
        "model": {**config["model"], "num_labels": 1},
        "dataset": {**config["dataset"], **changes},
        "dataset_val": {**config["dataset_val"], **changes},
        "loss": {"_component_": "torch.nn.MSELoss"},
    }
    result = finetune(regression, root / "scores", "epochs=15")
    assert result.summary["metrics"]["pearson"]["45"] > 0.95
    assert result.val_loss[45] < 0.1 * result.val_loss[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_labels=3", "set model.num_labels=2"),
        ("loss._component_=qst_tune.modules.LinearCrossEntropyLoss", "CrossEntropyLoss"),
        ("model.backbone=qst_tune.models.nope", "cannot be imported"),
        ("dataset.labels=[green,blue]", "label 'red' is neither one of green, blue"),
    ],
)
def test_a_users_mistake_is_one_line(
    override: str, message: str, root: Path, config: Config
) -> None:
    with pytest.raises(UserError, match=message) as error:
        finetune(config, root / "mistake", override)
    assert "\n" not in str(error.value)


def test_the_result_over_torchtunes_modules_opens_in_transformers(
    trained: FinetuneResult, root: Path
) -> None:
    tuned = QSTForSequenceClassification.from_pretrained(trained.directory / "side_network")
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    rows = [json.loads(line) for line in (root / "dev.jsonl").read_text().splitlines()]
    texts = [TEMPLATE.format(text=row["text"]) for row in rows]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = tuned(**{n: batch[n] for n in ("input_ids", "attention_mask")}).logits.argmax(-1)
    assert [LABELS[label] for label in found] == [row["label"] for row in rows]


def test_a_model_of_transformers_classifies_and_its_result_opens_in_transformers(
    root: Path, config: Config
) -> None:
    model = str(root / "model")
    block = {
        "_component_": "qst_tune.models.qst_classifier",
        "backbone": "qst_tune.models.backbone_from_hf",
        "checkpoint_dir": model,
        "num_labels": 2,
        "reduction_factor": 4,
    }
    reader = "qst_tune.training.HFCheckpointer"
    cfg = merged(
        {
            **config,
            "model": block,
            "checkpointer": {"_component_": reader, "checkpoint_dir": model},
            "output_dir": str(root / "over_transformers"),
            "metric_logger": {**config["metric_logger"], "log_dir": str(root / "over/logs")},
        },
        "epochs=10",
        "dtype=fp32",
    )
    qst_finetune.main(cfg)
    result = FinetuneResult(root / "over_transformers")
    assert result.summary["metrics"]["accuracy"]["40"] == 1.0
    side_network = result.directory / "side_network"
    tuned = QSTForSequenceClassification.from_pretrained(side_network, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in (root / "dev.jsonl").read_text().splitlines()]
    for row in rows:
        ids = tokenizer(TEMPLATE.format(text=row["text"]), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert LABELS[tuned(ids).logits.argmax()] == row["label"]
