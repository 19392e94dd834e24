"""The probe reads the data that the classifier reads, and says what it scored on."""

from pathlib import Path

import pytest

from benchmarks import linear_probe
from tests.support.checkpoints import finetune_config
from tests.support.methods import LABELS, TEMPLATE, write_rows
from tests.support.recipe_runs import merged


def test_commonest_class_and_probe_are_scored_on_all_held_out_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = finetune_config(tmp_path)
    dataset = {
        "_component_": "qst_tune.data.classification_dataset",
        "source": "json",
        "template": TEMPLATE,
        "labels": LABELS,
        "metrics": ["accuracy"],
        "cache_dir": str(tmp_path / "cache"),
    }
    classifier = {
        "_component_": "qst_tune.models.qst_classifier",
        "backbone": "torchtune.models.llama3_2.llama3_2",
        "num_labels": 2,
    }
    sizes = {name: value for name, value in config["model"].items() if name != "_component_"}
    changed = {
        **config,
        "model": {**classifier, **sizes},
        "dataset": {**dataset, "data_files": str(write_rows(tmp_path / "rows.jsonl", 24))},
        "dataset_val": {**dataset, "data_files": str(write_rows(tmp_path / "dev.jsonl", 7))},
    }
    linear_probe.main(merged(changed))
    commonest, probe = capsys.readouterr().out.splitlines()[-2:]
    # Of 24 rows half are red and of the 7 validation ones four; a tie goes to the first, red.
    assert commonest == "accuracy, commonest class: 0.5714 (24 training, 7 validation rows)"
    assert probe.startswith("accuracy, linear probe: ")
    assert probe.endswith(" (24 training, 7 validation rows)")
