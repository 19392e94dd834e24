"""Ids that a model has no row for are named before it runs; padding has a row in any case."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qst_tune.data.batches.checked_rows import CheckedRows
from qst_tune.data.batches.packing import align_packs
from qst_tune.errors import UserError
from qst_tune.modules.model_limits import (
    ModelLimits,
    check_finite,
    check_ids,
    check_length,
    limits_of,
    overflow_hint,
)
from tests.support.numbers import TINY, tiny_backbone


class Tokenizer:
    vocab_size = 12

    def __init__(self, pad_id: int | None = 0) -> None:
        self.pad_id = pad_id

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return f"<{ids[0]}>"


LIMITS = ModelLimits(10, 8, 64, Tokenizer())
SIZES = r"is outside the model: the tokenizer has 12 tokens, "


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"tokens": [1, 10, 11]}, f"^token '<10>' \\(10\\) {SIZES}the embedding 10 rows: use"),
        ({"tokens": [1, -1]}, f"^token '<-1>' \\(-1\\) {SIZES}the embedding 10"),
        (
            {"tokens": [1], "labels": [-100, 8]},
            f"^label '<8>' \\(8\\) {SIZES}the LM head 8 rows: use",
        ),
        ({"tokens": torch.tensor([1, 10])}, "^token '<10>'"),
        ({"chosen_input_ids": [1], "rejected_input_ids": [12]}, "^token '<12>'"),
        ({"chosen_labels": [-100], "rejected_labels": [9]}, "^label '<9>'"),
    ],
)
def test_first_id_without_a_row_is_named_with_all_sizes(row, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        raise UserError(LIMITS.problem(row))


def test_row_with_such_an_id_cannot_be_used() -> None:
    rows = [{"tokens": [1], "labels": [1]}, {"tokens": [10], "labels": [1]}]
    checked = CheckedRows(rows, name="dataset", source="file", limits=LIMITS)
    assert checked[0] == rows[0]
    with pytest.raises(UserError, match=r"^dataset: row 1 of file cannot be used: token '<10>'"):
        checked[1]


def test_ids_with_a_row_and_classes_are_no_problem() -> None:
    assert LIMITS.problem({"tokens": [0, 9], "labels": [-100, 7]}) is None
    assert LIMITS.problem({"tokens": [0, 9], "labels": 3}) is None
    assert LIMITS.problem({"tokens": [0, 9], "labels": 0.5}) is None
    own = ModelLimits(10, 10, 64, Tokenizer(), ignore_index=-1)
    assert own.problem({"tokens": [0], "labels": [-1]}) is None
    assert own.problem({"tokens": [0], "labels": [-100]}) is not None


def test_pack_of_the_users_is_checked_too() -> None:
    pack = {name: torch.tensor([1, 2]) for name in ("labels", "input_pos")}
    pack |= {"tokens": torch.tensor([3, 30]), "seq_lens": torch.tensor([2])}
    packs = align_packs([pack], "dataset", LIMITS)
    with pytest.raises(UserError, match=r"^dataset: pack 0 cannot be used: token '<30>' \(30\)"):
        packs[0]


@pytest.mark.parametrize(("pad_id", "expected"), [(9, 9), (10, 0), (-1, 0), (None, 0)])
def test_padding_has_a_row(pad_id: int | None, expected: int) -> None:
    assert ModelLimits(10, 10, 64, Tokenizer(pad_id)).pad_id == expected


def test_sizes_are_the_models() -> None:
    for tied in (False, True):
        found = limits_of(tiny_backbone(tied=tied), Tokenizer())
        assert (found.vocab_size, found.num_logits) == (TINY["vocab_size"],) * 2
        assert found.max_seq_len == TINY["max_seq_len"]
    model = SimpleNamespace(
        tok_embeddings=nn.Embedding(7, 2), output=nn.Linear(2, 5), max_seq_len=3
    )
    assert limits_of(model, Tokenizer()).num_logits == 5


def test_text_is_checked_before_the_model_runs() -> None:
    model = tiny_backbone()
    size = TINY["vocab_size"]
    check_ids(model, [[], [0, size - 1]])
    message = f"^token {size} of the text is outside the model, whose embedding has {size} rows"
    with pytest.raises(UserError, match=message):
        check_ids(model, [[0], [1, size]])


def test_length_limit_is_inclusive() -> None:
    check_length(torch.zeros(1, 8), 8)
    with pytest.raises(UserError, match=r"a row of 9 tokens .* max_seq_len 8: set tokenizer\.max"):
        check_length(torch.zeros(1, 9), 8)


def test_only_fp16_is_named_as_the_cause() -> None:
    assert overflow_hint(nn.Linear(2, 2)) == overflow_hint(nn.Linear(2, 2).bfloat16()) == ""
    assert "dtype=fp16 ends at 65504" in overflow_hint(nn.Linear(2, 2).half())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    check_finite(torch.zeros(3), nn.Linear(2, 2), "logits")
    with pytest.raises(UserError, match=r"^logits of the model are not finite$"):
        check_finite(torch.tensor([0.0, value]), nn.Linear(2, 2), "logits")
