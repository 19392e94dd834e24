"""Each label is moved to the position that predicts it, and never across the end of a sample."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from qst_tune.data.batches.collate import align_labels, build_collate
from qst_tune.errors import UserError
from qst_tune.modules.model_limits import ModelLimits

PAD, IGNORED = 0, -100

LABELS = torch.tensor([[-100, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])


def test_position_holds_the_label_of_the_token_behind_it() -> None:
    expected = [[1, 2, 3, 4, 5, -100], [7, 8, 9, 10, 11, -100]]
    assert align_labels(LABELS).tolist() == expected
    assert align_labels(LABELS, ignore_index=-1)[:, -1].tolist() == [-1, -1]


def test_sample_ends_where_positions_begin_anew() -> None:
    input_pos = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 3]])
    expected = [[1, 2, -100, 4, 5, -100], [-100, 8, 9, 10, -100, -100]]
    assert align_labels(LABELS, input_pos=input_pos).tolist() == expected


class Tokenizer:
    pad_id = PAD


LIMITS = ModelLimits(100, 100, 64, Tokenizer(), IGNORED)


def row(length: int) -> dict[str, list[int]]:
    """A row of a token as often as its number says."""
    return {"tokens": [length] * length, "labels": [length] * length}


def collate(max_seq_len: int = 64):
    return build_collate(replace(LIMITS, max_seq_len=max_seq_len))


def test_rows_are_padded_to_a_multiple_of_16_but_never_past_the_model() -> None:
    rows = [row(3), row(5)]
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
    name = "tests.data.batches.test_collate.flattened"
    collate = build_collate(LIMITS, name)
    batch = collate([row(3), row(2)])
    assert batch["tokens"].tolist() == [[3, 3, 3, 2, 2]]
    assert batch["labels"].tolist() == [[3, 3, IGNORED, 2, IGNORED]]
    assert batch["input_pos"].shape == batch["tokens"].shape


def test_unknown_collate_function_is_reported() -> None:
    with pytest.raises(UserError, match=r"collate_fn=torchtune\.data\.none cannot be imported"):
        build_collate(LIMITS, "torchtune.data.none")
