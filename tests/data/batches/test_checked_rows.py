"""Bad rows are named by number and line, and some rows can be held out."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torchtune.datasets import chat_dataset

from qst_tune.data.batches.checked_rows import (
    CheckedRows,
    check_chat_row,
    hold_out,
    row_numbers,
    with_literal_paths,
)
from qst_tune.data.batches.datasets import build_dataset
from qst_tune.errors import UserError
from qst_tune.modules.model_limits import ModelLimits
from tests.support.rows import SHAREGPT, TURNS, chat_tokenizer, write_rows


class Rows(list):
    """Gives a row's tokens, or raises what stands in its place."""

    def __getitem__(self, index: int) -> Any:
        value = super().__getitem__(index)
        if isinstance(value, Exception):
            raise value
        return {"tokens": value}


GOOD = [1, 2]
ROWS = Rows([GOOD, KeyError("input"), [1] * 9, [], [3]])
LIMITS = ModelLimits(10, 10, 8, None)


def checked(**settings: Any) -> CheckedRows:
    return CheckedRows(ROWS, **{"name": "dataset", "source": "rows", "limits": LIMITS, **settings})


def test_good_rows_pass() -> None:
    rows = checked()
    assert len(rows) == 5
    assert rows[0] == {"tokens": GOOD}
    assert rows[4] == {"tokens": [3]}


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (1, "KeyError: 'input'"),
        (2, "a row of 9 tokens is longer than the model's max_seq_len 8: set tokenizer.max_seq"),
        (3, "it has no tokens"),
    ],
)
def test_bad_row_is_named(index: int, reason: str) -> None:
    with pytest.raises(UserError) as error:
        checked()[index]
    expected = f"dataset: row {index} of rows cannot be used: {reason}"
    assert str(error.value).startswith(expected)
    with pytest.raises(UserError, match="row 1 of rows"):
        list(checked())


def test_error_of_the_dataset_itself_gets_the_row_number_too() -> None:
    rows = CheckedRows(Rows([UserError("label 7 is none of 2")]), name="dataset", source="rows")
    with pytest.raises(UserError, match=r"^dataset: row 0 of rows cannot .*: label 7 is none of 2"):
        rows[0]


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("rows.jsonl", "{}\n\n{}\n{}\n{}\n{}\n", r"rows\.jsonl \(line 3\) "),
        ("rows.json", "{}\n{}\n{}\n{}\n{}", r"rows\.json \(line 2\) "),
        ("rows.json", "[{},\n{},\n{}]", r"rows\.json cannot"),  # lines are not rows
        ("rows.csv", "a\n1\n2\n3\n4\n5\n", r"rows\.csv cannot"),
    ],
)
def test_line_is_named_where_lines_are_rows(
    name: str, text: str, place: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"row 1 of .*{place}"):
        checked(source=str(tmp_path / name))[1]


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(10, 0.3, 3), (10, 0.01, 1), (3, 0.5, 2)]
)
def test_every_row_either_trains_or_is_held_out(count: int, fraction: float, held_out: int) -> None:
    rows = list(range(100, 100 + count))
    train, val = hold_out(rows, fraction, seed=3)
    assert len(val) == held_out
    assert sorted([*train, *val]) == rows
    assert list(train) == sorted(train), "in the dataset's order"
    again = hold_out(rows, fraction, seed=3)
    assert (again[0].indices, again[1].indices) == (train.indices, val.indices)


def test_another_seed_holds_out_other_rows() -> None:
    choices = {tuple(hold_out(range(50), 0.2, seed)[1].indices) for seed in range(10)}
    assert len(choices) == 10


def test_row_numbers_are_those_of_the_whole_dataset() -> None:
    rows = list(range(10))
    train, _ = hold_out(rows, 0.3, seed=0)
    assert [rows[i] for i in row_numbers(train, range(7))] == list(train)
    assert row_numbers(rows, [3, 1]) == [3, 1]


class Kept(list):
    numbers = (4, 7, 9)


def test_row_numbers_count_rows_that_were_left_out() -> None:
    kept = Kept("abc")
    assert row_numbers(kept, [2, 0]) == [9, 4]
    part, _ = hold_out(kept, 0.3, seed=0)
    assert row_numbers(part, [0, 1]) == [kept.numbers[i] for i in part.indices]


class Placed(Rows):
    def place(self, index: int) -> str:
        return f"the {index}th"


def test_dataset_may_know_the_places_of_its_rows() -> None:
    rows = CheckedRows(Placed([GOOD, KeyError("input")]), name="dataset", source="rows")
    with pytest.raises(UserError, match=r"^dataset: the 1th cannot be used: KeyError"):
        rows[1]


STYLES = {
    "openai": {"conversation_column": "messages", "conversation_style": "openai"},
    "sharegpt": {"conversation_column": "conversations", "conversation_style": "sharegpt"},
}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function"}]}


@pytest.mark.parametrize(
    ("style", "row", "message"),
    [
        ("openai", {"messages": [TURNS[0], CALL]}, r"messages\[1\]\.tool_calls: torchtune's chat"),
        (
            "openai",
            {"messages": [TURNS[0], {**TURNS[1], "content": None}]},
            r"\[1\]\.content is nu",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "user", "value": "a"}, SHAREGPT[1]]},
            r"conversations\[0\]\.from is 'user': .* knows system, human, gpt; rename it, or use",
        ),
    ],
)
def test_conversation_that_torchtune_misreads_is_refused(
    style: str, row: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    block = {
        "_component_": "torchtune.datasets.chat_dataset",
        "source": "json",
        "data_files": write_rows(tmp_path / "r.jsonl", row),
        **STYLES[style],
    }
    with pytest.raises(UserError, match=rf"^dataset: row 0 of .*{message}") as error:
        build_dataset(OmegaConf.create(block), "dataset", chat_tokenizer(tmp_path))
    assert "dataset._component_=qst_tune.data.auto_dataset" in str(error.value)


def test_conversations_that_torchtune_reads_pass(tmp_path: Path) -> None:
    rows = {"openai": {"messages": TURNS}, "sharegpt": {"conversations": SHAREGPT}}
    for style, row in rows.items():
        path = write_rows(tmp_path / f"{style}.jsonl", row)
        settings = {"source": "json", "data_files": path, "split": "train", **STYLES[style]}
        dataset = chat_dataset(
            chat_tokenizer(tmp_path), cache_dir=str(tmp_path / "cache"), **settings
        )
        check_chat_row(dataset, 0)
        assert dataset[0]["tokens"]
    check_chat_row([{"messages": [CALL]}], 0)


def test_name_with_brackets_is_read_by_torchtunes_components(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data[v2].jsonl", {"input": "a", "output": "b"})
    block = {
        "_component_": "torchtune.datasets.instruct_dataset",
        "source": "json",
        "data_files": [path],
        "cache_dir": str(tmp_path / "cache"),
    }
    rows, _ = build_dataset(OmegaConf.create(block), "dataset", chat_tokenizer(tmp_path))
    assert len(rows) == 1
    pattern = OmegaConf.create({"data_files": str(tmp_path / "*.jsonl")})
    assert with_literal_paths(pattern) == pattern
