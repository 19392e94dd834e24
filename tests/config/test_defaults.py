"""What a config leaves open is filled in."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from qst_tune.config.defaults import data_files, dataset_blocks, fill_in
from qst_tune.errors import UserError

AUTO, CHAT = "qst_tune.data.auto_dataset", "torchtune.datasets.chat_dataset"


def filled(**keys: Any) -> DictConfig:
    cfg = OmegaConf.create(keys)
    fill_in(cfg)
    return cfg


def test_device_and_dtype_are_those_of_the_run() -> None:
    for cfg in (filled(), filled(device="auto", dtype="auto")):
        assert cfg.device in ("cpu", "cuda", "mps")
        assert cfg.dtype in ("bf16", "fp16", "fp32")
    assert filled(device="cuda:1", dtype="fp32") == {"device": "cuda:1", "dtype": "fp32"}


TRAIN = {
    "_component_": AUTO,
    "data_files": "train.jsonl",
    "source": "hub/rows",
    "split": "train[:9]",
    "column_map": {"input": "q"},
}


@pytest.mark.parametrize(
    ("val", "expected"),
    [
        (
            {"data_files": "val.jsonl"},
            {"_component_": AUTO, "column_map": {"input": "q"}, "data_files": "val.jsonl"},
        ),
        ({"split": "train[9:]"}, {**TRAIN, "split": "train[9:]"}),
        (
            {"source": "hub/others", "packed": True},
            {
                "_component_": AUTO,
                "column_map": {"input": "q"},
                "source": "hub/others",
                "packed": True,
            },
        ),
        ({"_component_": CHAT, "source": "json"}, {"_component_": CHAT, "source": "json"}),
    ],
)
def test_validation_set_takes_settings_but_not_rows(
    val: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert filled(dataset=TRAIN, dataset_val=val).dataset_val == expected


def test_validation_set_without_rows_of_its_own_is_refused() -> None:
    with pytest.raises(UserError, match="dataset_val names no rows, and would have those of data"):
        filled(dataset=TRAIN, dataset_val={"packed": True})


def test_validation_files_of_torchtunes_components_keep_the_format() -> None:
    train = {"_component_": CHAT, "source": "json", "data_files": "t.x", "conversation_column": "m"}
    val = filled(dataset=train, dataset_val={"data_files": "v.x"}).dataset_val
    assert val == {**train, "data_files": "v.x"}


@pytest.mark.parametrize(
    ("name", "source"),
    [("r.jsonl", "json"), ("r.json.gz", "json"), ("r.csv", "csv"), ("r.x", "hub/rows")],
)
def test_local_files_go_before_the_hub_for_torchtunes_components(
    name: str, source: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("{}")
    block = {"_component_": CHAT, "source": "hub/rows", "data_files": str(tmp_path / name)}
    assert filled(dataset=block).dataset.source == source
    absent = {**block, "data_files": str(tmp_path / "inside_the_repository.jsonl")}
    assert filled(dataset=[absent]).dataset[0].source == "hub/rows"
    ours = {**block, "_component_": AUTO}
    assert filled(dataset=ours).dataset.source == "hub/rows", "it reads files itself"


def test_every_block_of_the_datasets_is_found_with_its_path_and_files() -> None:
    several = [{"data_files": "a"}, {"data_files": ["b", "c"]}]
    cfg = OmegaConf.create({"dataset": several, "dataset_val": {"data_files": {"train": "d"}}})
    found = dataset_blocks(cfg, "dataset", "dataset_val", "absent")
    assert {path: data_files(block) for path, block in found} == {
        "dataset[0]": ["a"],
        "dataset[1]": ["b", "c"],
        "dataset_val": [],
    }
