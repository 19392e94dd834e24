"""The eight tasks: columns, classes and metrics of nyu-mll/glue."""

import json

import pytest
from datasets import Dataset

from qst_tune.data import GLUE_TASKS, glue, glue_dataset
from qst_tune.errors import UserError
from qst_tune.training.classification import METRICS
from tests.data.test_classification import Tokenizer
from tests.support.shared_data import GLUE as REAL_DATA
from tests.support.shared_data import needs

# task: columns and number of classes (1: a score), as the hub's dataset card has them.
COLUMNS = {
    "rte": (("sentence1", "sentence2"), 2),
    "mrpc": (("sentence1", "sentence2"), 2),
    "stsb": (("sentence1", "sentence2"), 1),
    "cola": (("sentence",), 2),
    "sst2": (("sentence",), 2),
    "qnli": (("question", "sentence"), 2),
    "qqp": (("question1", "question2"), 2),
    "mnli": (("premise", "hypothesis"), 3),
}


def test_there_are_eight_tasks():
    assert set(GLUE_TASKS) == set(COLUMNS)


@pytest.mark.parametrize("task", COLUMNS)
def test_a_row_becomes_a_text_with_all_its_columns(task, tmp_path):
    columns, num_labels = COLUMNS[task]
    row = {column: f"<{column}>" for column in columns} | {"label": num_labels - 1}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    rows = glue_dataset(
        Tokenizer(),
        task=task,
        source="json",
        data_files=str(path),
        cache_dir=str(tmp_path / "cache"),
    )
    text = "".join(map(chr, rows[0]["tokens"][1:]))
    assert all(f"<{column}>" in text for column in columns)
    assert text.endswith(":")  # where a language model would answer
    assert rows.num_labels == num_labels
    assert rows[0]["labels"] == num_labels - 1
    assert all(metric in METRICS for metric in rows.metrics)


def test_each_task_has_the_metrics_of_glue():
    expected = {task: ("accuracy",) for task in COLUMNS} | {
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "cola": ("matthews",),
        "stsb": ("pearson", "spearman"),
    }
    assert {name: task.metrics for name, task in GLUE_TASKS.items()} == expected


def test_the_hubs_dataset_is_asked_for_by_the_tasks_name(monkeypatch):
    asked = {}

    def load_dataset(source, **arguments):
        asked.update(source=source, **arguments)
        return Dataset.from_list([{"sentence": "a", "label": 1}])

    monkeypatch.setattr("qst_tune.data.classification.load_dataset", load_dataset)
    rows = glue_dataset(Tokenizer(), task="cola", split="validation")
    assert asked == {"source": glue.HUB_NAME, "name": "cola", "split": "validation"}
    assert len(rows) == 1


def test_an_unknown_task_is_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"task='sst-2' is none of rte, mrpc.*did you mean 'sst2'"):
        glue_dataset(Tokenizer(), task="sst-2")


@needs(REAL_DATA)
@pytest.mark.parametrize(("task", "num_rows"), [("rte", 277), ("sst2", 872)])
def test_every_row_of_the_real_dev_set_can_be_read(task, num_rows, tmp_path):
    rows = glue_dataset(
        Tokenizer(),
        task=task,
        source="json",
        data_files=str(REAL_DATA / task / "dev.jsonl"),
        cache_dir=str(tmp_path),
    )
    labels = [rows[index]["labels"] for index in range(len(rows))]
    assert len(labels) == num_rows
    assert set(labels) == {0, 1}
