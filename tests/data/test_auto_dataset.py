"""Rows of every form are tokenized as the conversation, text or preference that they mean."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from torchtune.datasets import chat_dataset, instruct_dataset, preference_dataset

from qst_tune.data import AutoDataset, HFChatTokenizer, auto_dataset
from qst_tune.errors import UserError
from tests.support.rows import ANSWER, QUESTION, SHAREGPT, TURNS, chat_tokenizer, chatml, write_rows

IGNORED = -100
ONE_TURN = chatml(("user", QUESTION), ("assistant", ANSWER))
CONVERSATIONS = {
    "messages": {"messages": TURNS},
    "text parts": {
        "messages": [TURNS[0], {**TURNS[1], "content": [{"type": "text", "text": ANSWER}]}]
    },
    "messages under ShareGPT's keys": {"messages": SHAREGPT},
    "conversations": {"conversations": SHAREGPT, "id": 3},
    "conversations, other names": {
        "conversations": [
            {"from": "user", "value": QUESTION},
            {"from": "assistant", "value": ANSWER},
        ]
    },
    "conversations under OpenAI's keys": {"conversations": TURNS},
    "JSON in a field": {"messages": json.dumps(TURNS)},
    "instruction": {"instruction": QUESTION, "output": ANSWER},
    "instruction with empty input": {
        "instruction": QUESTION,
        "input": "",
        "output": ANSWER,
        "text": "x",
    },
    "prompt and completion": {"prompt": QUESTION, "completion": ANSWER},
    "TRL's prompt and completion": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "input and output": {"input": QUESTION, "output": ANSWER},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HFChatTokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def dataset_of(directory: Path, tokenizer: Any, *rows: Any, **settings: Any) -> AutoDataset:
    return auto_dataset(tokenizer, data_files=write_rows(directory / "r.jsonl", *rows), **settings)


def texts(tokenizer: HFChatTokenizer, tokens: list[int], labels: list[int]) -> tuple[str, str]:
    """All of a row, and what of it is learnt."""
    assert len(tokens) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(tokens, labels, strict=True))
    learnt = [label for label in labels if label != IGNORED]
    whole, part = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (tokens, learnt))
    return whole, part


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_one_turn_is_the_same_in_each_form(
    name: str, tokenizer: HFChatTokenizer, tmp_path: Path
) -> None:
    row = dataset_of(tmp_path, tokenizer, CONVERSATIONS[name])[0]
    assert texts(tokenizer, row["tokens"], row["labels"]) == (ONE_TURN, f"{ANSWER}<|im_end|>")


def test_input_of_an_instruction_is_the_second_paragraph_of_the_user_turn(
    tokenizer: HFChatTokenizer, tmp_path: Path
) -> None:
    row = dataset_of(tmp_path, tokenizer, {"instruction": "a", "input": "b", "output": "c"})[0]
    whole, _ = texts(tokenizer, row["tokens"], row["labels"])
    assert whole == chatml(("user", "a\n\nb"), ("assistant", "c"))


def test_text_is_learnt_whole_and_ends(tokenizer: HFChatTokenizer, tmp_path: Path) -> None:
    row = dataset_of(tmp_path, tokenizer, {"text": "red box"})[0]
    assert row["tokens"] == row["labels"] == tokenizer.encode("red box")
    assert row["tokens"][-1] == tokenizer.eos_id


def test_rows_equal_those_of_torchtunes_datasets(
    tokenizer: HFChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    turns = [{"role": "system", "content": "be brief"}, *TURNS, *TURNS]
    cases = {
        "messages": (
            chat_dataset,
            {"conversation_column": "messages", "conversation_style": "openai"},
            {"messages": turns},
        ),
        "input": (instruct_dataset, {}, {"input": QUESTION, "output": ANSWER}),
    }
    for name, (builder, settings, row) in cases.items():
        path = write_rows(tmp_path / f"{name}.jsonl", row)
        theirs = builder(tokenizer, source="json", data_files=path, split="train", **settings)[0]
        ours = auto_dataset(tokenizer, data_files=path)[0]
        assert ours == {key: theirs[key] for key in ("tokens", "labels")}, name


PREFERENCES = {
    "text": {"prompt": QUESTION, "chosen": ANSWER, "rejected": "no"},
    "messages": {
        "prompt": TURNS[:1],
        "chosen": TURNS[1:],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
    "implicit prompt": {
        "chosen": TURNS,
        "rejected": [TURNS[0], {"role": "assistant", "content": "no"}],
    },
    "prompt twice": {
        "prompt": QUESTION,
        "chosen": TURNS,
        "rejected": [TURNS[0], {"role": "assistant", "content": "no"}],
        "score": 3,
    },
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_equal_those_of_torchtune(
    name: str, tokenizer: HFChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write_rows(tmp_path / "theirs.jsonl", PREFERENCES["implicit prompt"])
    theirs = preference_dataset(tokenizer, source="json", data_files=path, split="train")[0]
    assert dataset_of(tmp_path, tokenizer, PREFERENCES[name])[0] == theirs


def test_form_is_described_with_what_is_not_read(
    tokenizer: HFChatTokenizer, tmp_path: Path
) -> None:
    rows = dataset_of(tmp_path, tokenizer, {"id": 1, "messages": TURNS, "text": "x"})
    assert rows.describe() == f"{tmp_path / 'r.jsonl'}: form messages; not read: id, text"


def test_columns_are_renamed(tokenizer: HFChatTokenizer, tmp_path: Path) -> None:
    odd = {"input": 7, "ask": QUESTION, "say": ANSWER}
    names = {"input": "ask", "output": "say"}
    rows = dataset_of(tmp_path, tokenizer, odd, column_map=names)
    assert texts(tokenizer, **rows[0]) == (ONE_TURN, f"{ANSWER}<|im_end|>")
    assert rows.describe().endswith("form input, output (input from ask, output from say)")
    both = {"chosen": TURNS, "rejected": TURNS, "other": TURNS}
    named = dataset_of(tmp_path, tokenizer, both, column_map={"messages": "chosen"})
    assert named.form.name == "messages", "what the user names is read"


def test_system_prompt_is_for_rows_without_one_and_a_new_one_for_all(
    tokenizer: HFChatTokenizer, tmp_path: Path
) -> None:
    own = [{"role": "system", "content": "own"}, *TURNS]
    rows = ({"messages": own}, {"messages": TURNS})

    def systems(**settings: Any) -> list[str]:
        dataset = dataset_of(tmp_path, tokenizer, *rows, **settings)
        whole = [texts(tokenizer, **row)[0] for row in dataset]
        return [text.removesuffix(ONE_TURN) for text in whole]

    assert systems() == [chatml(("system", "own")), ""]
    assert systems(system_prompt="x") == [chatml(("system", "own")), chatml(("system", "x"))]
    assert systems(new_system_prompt="x") == [chatml(("system", "x"))] * 2


def test_answer_of_weight_zero_is_not_learnt_and_input_is_on_request(
    tokenizer: HFChatTokenizer, tmp_path: Path
) -> None:
    turns = [
        TURNS[0],
        {**TURNS[1], "weight": 0},
        TURNS[0],
        {"role": "assistant", "content": "blue"},
    ]
    assert (
        texts(tokenizer, **dataset_of(tmp_path, tokenizer, {"messages": turns})[0])[1]
        == "blue<|im_end|>"
    )
    everything = dataset_of(tmp_path, tokenizer, {"messages": turns}, train_on_input=True)[0]
    assert QUESTION in texts(tokenizer, **everything)[1]


def test_rows_are_cut_to_the_tokenizers_limit(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, max_seq_len=8)
    for row in ({"messages": TURNS}, {"text": QUESTION * 9}):
        assert len(dataset_of(tmp_path, tokenizer, row)[0]["tokens"]) == 8


def test_nested_types_of_parquet_are_rows(tokenizer: HFChatTokenizer, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "system", "content": "x", "weight": None}, *TURNS]},
        {"messages": TURNS},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    dataset = auto_dataset(tokenizer, data_files=str(tmp_path / "r.parquet"))
    assert texts(tokenizer, **dataset[1]) == (ONE_TURN, f"{ANSWER}<|im_end|>")


class TorchtuneTokenizer:
    """One of torchtune's, which knows its own messages only."""

    max_seq_len = None

    def tokenize_messages(self, messages: list[Any]) -> tuple[list[int], list[bool]]:
        return [len(m.text_content) for m in messages], [m.masked for m in messages]


def test_tokenizers_of_torchtune_get_their_own_messages(tmp_path: Path) -> None:
    row = dataset_of(tmp_path, TorchtuneTokenizer(), {"messages": TURNS})[0]
    assert row == {"tokens": [len(QUESTION), len(ANSWER)], "labels": [IGNORED, len(ANSWER)]}


@pytest.mark.parametrize("key", ["tool_calls", "tools"])
def test_tool_call_that_a_tokenizer_cannot_express_is_refused(key: str, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    row: dict[str, Any] = {"messages": TURNS, "tools": [call]}
    if key == "tool_calls":
        row = {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}
    with pytest.raises(UserError, match=r"TorchtuneTokenizer cannot express: use the tokenizer"):
        dataset_of(tmp_path, TorchtuneTokenizer(), row)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_files": None}, "set dataset.data_files=my.jsonl"),
        ({"packed": True}, "packed and split_across_pack go together"),
        ({"system_prompt": "a", "new_system_prompt": "b"}, "exclude each other"),
        ({"column_map": {"inpt": "input"}}, "'inpt' is no column of a form; it must be one of"),
        ({"column_map": {"text": "nothing"}}, "no column 'nothing', only messages"),
        ({"split": "test"}, "split=test is not of a local file: use train"),
    ],
)
def test_wrong_setting_is_one_line(
    settings: dict[str, Any], message: str, tokenizer: HFChatTokenizer, tmp_path: Path
) -> None:
    files = {"data_files": write_rows(tmp_path / "r.jsonl", {"messages": TURNS})}
    with pytest.raises(UserError, match=message):
        auto_dataset(tokenizer, **{**files, **settings})
