"""Datasets that can or cannot be used, and how their rows are padded."""

from typing import Any

import pytest
from omegaconf import OmegaConf
from torchtune.datasets import ConcatDataset

from qst_tune.data.batches.datasets import build_dataset
from qst_tune.errors import UserError

PAD, IGNORED = 0, -100


class Rows:
    """A dataset whose row i is i + 1 tokens of value i + 1."""

    def __init__(self, tokenizer: Any = None, *, count: int = 10, fail: bool = False) -> None:
        self.count, self.fail = count, fail

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if self.fail:
            raise KeyError("input")
        row = [index + 1] * (index + 1)
        return {"tokens": row, "labels": row}


def dataset_block(**settings):
    return OmegaConf.create({"_component_": "tests.data.batches.test_datasets.Rows", **settings})


def test_dataset_or_list_of_datasets_is_built() -> None:
    assert len(build_dataset(dataset_block(), "dataset", None)[0]) == 10
    both = OmegaConf.create([dataset_block(count=3), dataset_block(count=4)])
    built, surveys = build_dataset(both, "dataset", None)
    assert [survey.name for survey in surveys] == ["dataset[0]", "dataset[1]"]
    assert isinstance(built, ConcatDataset)
    assert len(built) == 7


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (dataset_block(count=0), r"^dataset: .*Rows has no rows$"),
        (dataset_block(fail=True), r"^dataset: row 0 of .*Rows cannot be used: KeyError: 'input'$"),
        (OmegaConf.create([dataset_block(), dataset_block(count=0)]), r"^dataset\[1\]: .* no rows"),
    ],
)
def test_dataset_that_cannot_be_used_is_reported(block, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_dataset(block, "dataset", None)
