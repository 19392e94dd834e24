"""How templates end an answer, and the tokens that generation stops at."""

import re

import pytest

from qst_tune.data.chat.template import (
    ChatTemplate,
    find_stop_strings,
    find_turn_end,
    special_pattern,
)
from tests.support import templates
from tests.support.chat_directories import CHATML

SPECIAL = special_pattern(["<|im_end|>", "<|im_start|>", "<eos>", "<bos>", "<|call|>"])
PLAIN = "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n\n' }}{% endfor %}"
# A call ends with another token than an answer.
CALLS = (
    "{% for m in messages %}{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function.arguments | tojson + '<|call|>' }}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<bos>", "eos_token": "<eos>"})


@pytest.mark.parametrize(
    ("source", "closing", "tail"),
    [
        (CHATML, "<|im_end|>", ""),
        (templates.PHI3, "<|im_end|>", "<eos>"),
        (templates.LLAMA2, " <eos>", ""),
        (templates.GPT_OSS, "<eos>", ""),
        (PLAIN, "", ""),
        ("{{ raise_exception('no') }}", "", ""),
        ("{% for m in messages %}<|im_end|>{% endfor %}", "", ""),
    ],
    ids=["chatml", "phi3", "llama2", "gpt-oss", "plain", "refuses", "no contents"],
)
def test_end_of_an_answer(source: str, closing: str, tail: str) -> None:
    found = find_turn_end(template_of(source), SPECIAL)
    assert (found.closing, found.tail) == (closing, tail)


@pytest.mark.parametrize(
    ("source", "stops"),
    [
        (CHATML, ["<|im_end|>"]),
        (templates.PHI3, ["<|im_end|>"]),
        (templates.QWEN3, ["<|im_end|>"]),
        (templates.TEKKEN, ["<eos>"]),
        (CALLS, ["<|im_end|>", "<|call|>"]),
        (PLAIN, []),
        ("{% for m in messages %}<|im_end|>{% endfor %}", []),
    ],
    ids=["chatml", "phi3", "qwen3", "tekken", "calls", "plain", "no contents"],
)
def test_tokens_to_stop_at(source: str, stops: list[str]) -> None:
    template = template_of(source)
    assert find_stop_strings(template, find_turn_end(template, SPECIAL)) == stops


def test_the_longest_special_token_is_found() -> None:
    assert special_pattern(["<a>", "<a><b>"]).findall("x<a><b>") == ["<a><b>"]
    assert re.search(special_pattern([]), "anything") is None
