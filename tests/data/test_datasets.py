"""Datasets that can or cannot be used, and how their rows are padded."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torchtune.datasets import ConcatDataset

from qst_tune.data.batches.datasets import build_collate, build_dataset
from qst_tune.errors import UserError
from qst_tune.modules.model_limits import ModelLimits

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


class Tokenizer:
    pad_id = PAD


LIMITS = ModelLimits(100, 100, 64, Tokenizer(), IGNORED)


def collate(max_seq_len: int = 64):
    return build_collate(replace(LIMITS, max_seq_len=max_seq_len))


def test_rows_are_padded_to_a_multiple_of_16_but_never_past_the_model() -> None:
    rows = [Rows()[2], Rows()[4]]
    batch = collate()(rows)
    assert batch["tokens"].shape == batch["labels"].shape == (2, 16)
    assert batch["tokens"][1].tolist() == [5] * 5 + [PAD] * 11
    assert batch["labels"][0].tolist() == [3] * 2 + [IGNORED] * 14
    assert collate(max_seq_len=7)(rows)["tokens"].shape == (2, 7)
    assert collate(max_seq_len=4)(rows)["tokens"].shape == (2, 5), "too long: told elsewhere"


def flattened(rows: list[Any], *, padding_idx: int, ignore_idx: int) -> dict[str, torch.Tensor]:
    """All rows in one, as a user's own function may have it; numbered row by row."""
    tokens = torch.tensor([token for row in rows for token in row["tokens"]])
    numbers = torch.tensor([n for row in rows for n in range(len(row["tokens"]))])
    return {"tokens": tokens[None], "labels": tokens[None], "input_pos": numbers[None]}


def test_own_collate_function_that_joins_rows_keeps_their_labels_apart() -> None:
    name = "tests.data.test_datasets.flattened"
    collate = build_collate(LIMITS, name)
    batch = collate([Rows()[2], Rows()[1]])
    assert batch["tokens"].tolist() == [[3, 3, 3, 2, 2]]
    assert batch["labels"].tolist() == [[3, 3, IGNORED, 2, IGNORED]]
    assert batch["input_pos"].shape == batch["tokens"].shape


def test_unknown_collate_function_is_told() -> None:
    with pytest.raises(UserError, match=r"collate_fn=torchtune\.data\.none cannot be imported"):
        build_collate(LIMITS, "torchtune.data.none")


def dataset_block(**settings):
    return OmegaConf.create({"_component_": "tests.data.test_datasets.Rows", **settings})


def test_dataset_or_list_of_datasets_is_built() -> None:
    assert len(build_dataset(dataset_block(), "dataset", None)) == 10
    both = OmegaConf.create([dataset_block(count=3), dataset_block(count=4)])
    built = build_dataset(both, "dataset", None)
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
def test_dataset_that_cannot_be_used_is_told(block, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_dataset(block, "dataset", None)
