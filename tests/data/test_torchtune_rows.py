"""What torchtune's own datasets misread is refused, with what takes it."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torchtune.datasets import chat_dataset

from qst_tune.data.batches.datasets import build_dataset
from qst_tune.data.batches.checked_rows import check_chat_row, with_literal_paths
from qst_tune.errors import UserError
from tests.support.rows import SHAREGPT, TURNS, chat_tokenizer, write_rows

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
    assert len(build_dataset(OmegaConf.create(block), "dataset", chat_tokenizer(tmp_path))) == 1
    pattern = OmegaConf.create({"data_files": str(tmp_path / "*.jsonl")})
    assert with_literal_paths(pattern) == pattern
