"""Files of tools for generation."""

import json
from pathlib import Path

import pytest
from torchtune.data import Message

from qst_tune.data import hf_chat_tokenizer
from qst_tune.errors import UserError
from qst_tune.generation.conversation import prompt_tokens
from qst_tune.generation.tools import read_tool_file
from tests.support.chat_directories import CHATML, build_directory
from tests.support.templates import QWEN3

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
QUESTION = [Message(role="user", content="hello")]


def test_tools_are_in_the_prompt_as_in_a_training_row(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    tokenizer = hf_chat_tokenizer(str(build_directory(tmp_path / "m", QWEN3)))
    tools = read_tool_file(tmp_path / "tools.json", tokenizer)
    assert tools == [TOOL]
    prompt = prompt_tokens(tokenizer, QUESTION, tools=tools)
    row = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "day"}]
    whole, mask = tokenizer.tokenize_conversation(row, tools=tools)
    assert prompt == whole[: len(prompt)]
    assert mask[: len(prompt)] == [True] * len(prompt)
    assert not mask[len(prompt)]


def test_a_template_without_tools_is_refused(tmp_path: Path) -> None:
    tokenizer = hf_chat_tokenizer(str(build_directory(tmp_path / "m", CHATML)))
    with pytest.raises(UserError, match="the chat template does not render the tools"):
        prompt_tokens(tokenizer, QUESTION, tools=[TOOL])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read"),
        ("[]", "has no tool"),
        ("3", "it must be a list"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_file_of_tools_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "tools.json").write_text(content)
    tokenizer = hf_chat_tokenizer(str(build_directory(tmp_path / "m", CHATML)))
    with pytest.raises(UserError, match=message):
        read_tool_file(tmp_path / "tools.json", tokenizer)


def test_another_tokenizer_takes_no_tools() -> None:
    with pytest.raises(UserError, match="object takes no tools"):
        read_tool_file(Path("tools.json"), object())
