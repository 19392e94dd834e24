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
        ("[", "is not JSON at line 1, column 2"),
        ("[" * 100_000, "nested too deeply"),
        ("[{}]", "the name of a function is null"),
        ('[{"type": 5}]', "is no JSON schema of a function"),
        ('[{"type": "function", "function": [1]}]', "is no JSON schema of a function"),
        ('[{"function": {"name": 5}}]', r"is a number \(5\): it must be text"),
        (r'[{"function": {"name": "\ud800"}}]', "is half a character"),
        ('[{"name": "f", "x": NaN}]', "NaN is no value of JSON"),
        ('[{"name": "f", "name": "g"}]', "the key 'name' is there twice"),
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
    with pytest.raises(UserError, match=message) as raised:
        read_tool_file(tmp_path / "tools.json", tokenizer)
    assert str(raised.value).count("tools.json") == 1
    assert "\n" not in str(raised.value)


def test_another_tokenizer_takes_no_tools() -> None:
    with pytest.raises(UserError, match="object takes no tools"):
        read_tool_file(Path("tools.json"), object())


@pytest.mark.parametrize("path", ["~no_such_user_x/tools.json", "x" * 5000, "a\0b", "."])
def test_a_path_that_is_no_file_is_one_line(path: str, tmp_path: Path) -> None:
    tokenizer = hf_chat_tokenizer(str(build_directory(tmp_path / "m", CHATML)))
    with pytest.raises(UserError, match="tools=") as raised:
        read_tool_file(Path(path), tokenizer)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("where", ["prompt", "system"])
def test_half_a_character_in_a_prompt_is_one_line(where: str, tmp_path: Path) -> None:
    """Bytes of a terminal that are not UTF-8 arrive so; tokenizers raise a TypeError."""
    tokenizer = hf_chat_tokenizer(str(build_directory(tmp_path / "m", CHATML)))
    text = "what is \udcff"
    asked = [Message(role="user", content=text if where == "prompt" else "hello")]
    with pytest.raises(UserError, match="a prompt has half a character at 8"):
        prompt_tokens(tokenizer, asked, system_prompt=text if where == "system" else None)
