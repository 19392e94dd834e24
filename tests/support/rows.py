"""A tokenizer and files of rows for the tests of auto_dataset."""

import json
from pathlib import Path
from typing import Any

from qst_tune.data import HFChatTokenizer, hf_chat_tokenizer
from tests.support.checkpoints import write_chat_tokenizer

QUESTION, ANSWER = "what is the colour", "it is red"
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
SHAREGPT = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]


def chat_tokenizer(directory: Path, max_seq_len: int | None = None) -> HFChatTokenizer:
    """The ChatML tokenizer of ``tests.support.checkpoints``."""
    write_chat_tokenizer(directory)
    return hf_chat_tokenizer(str(directory), max_seq_len)


def write_rows(path: Path, *rows: Any) -> str:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chatml(*turns: tuple[str, str]) -> str:
    """The conversation as the tokenizer's template writes it."""
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
