"""What is learnt of conversations that templates of many kinds render, against written answers."""

from pathlib import Path
from typing import Any

import pytest

from qst_tune.data import HFChatTokenizer, hf_chat_tokenizer
from tests.data.templates import DEEPSEEK, GPT_OSS, LLAMA2, MISTRAL, PHI3, QWEN3
from tests.data.test_chat_tokenizer import build_folder

TWO_TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "and you <|im_end|>"},
    {"role": "assistant", "content": "fine"},
]
SYSTEM = {"role": "system", "content": "be kind"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nwell"}


def learnt(tokenizer: HFChatTokenizer, messages: list[dict[str, Any]], **settings: Any) -> str:
    tokens, mask = tokenizer.tokenize_conversation(messages, **settings)
    kept = [token for token, is_masked in zip(tokens, mask, strict=True) if not is_masked]
    return tokenizer.decode(kept, skip_special_tokens=False)


def tokenizer_of(folder: Path, template: str) -> HFChatTokenizer:
    return hf_chat_tokenizer(str(build_folder(folder, template, eos_token="<|endoftext|>")))


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (QWEN3, TWO_TURNS, "good day<|im_end|><think>\n\n</think>\n\nfine<|im_end|>"),
        (PHI3, TWO_TURNS, "good day<|im_end|>fine<|im_end|>"),
        (MISTRAL, [SYSTEM, *TWO_TURNS], " good day<|endoftext|> fine<|endoftext|>"),
        (LLAMA2, [SYSTEM, *TWO_TURNS], " good day <|endoftext|> fine <|endoftext|>"),
        (
            QWEN3,
            [*TWO_TURNS[:1], THOUGHT, *TWO_TURNS[2:3], THOUGHT],
            "well<|im_end|><think>\nhm\n</think>\n\nwell<|im_end|>",
        ),
        (
            DEEPSEEK,
            [*TWO_TURNS[:1], THOUGHT, *TWO_TURNS[2:3], THOUGHT],
            "well<|endoftext|>well<|endoftext|>",
        ),
        (
            GPT_OSS,
            TWO_TURNS,
            "<|channel|>final<|message|>good day<|im_end|>"
            "<|channel|>final<|message|>fine<|endoftext|>",
        ),
    ],
    ids=["qwen3", "phi3", "mistral", "llama2", "qwen3 thoughts", "deepseek thoughts", "gpt-oss"],
)
def test_each_answer_and_its_end_token_are_learnt(
    tmp_path: Path, template: str, messages: list[dict[str, Any]], expected: str
) -> None:
    assert learnt(tokenizer_of(tmp_path / "m", template), messages) == expected
