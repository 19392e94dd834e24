"""What is learnt of conversations that templates of many kinds render, against written answers."""

import random
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from torchtune.data import Message
from transformers import AutoTokenizer

from qst_tune.data import HFChatTokenizer, hf_chat_tokenizer
from qst_tune.data.chat import learnt_spans
from qst_tune.errors import UserError
from tests.support import templates
from tests.support.chat_directories import CHATML, build_directory

Conversation = list[dict[str, Any]]

HELLO = {"role": "user", "content": "hello"}
AND_YOU = {"role": "user", "content": "and you <|im_end|>"}  # a marker in a user's words
FINE = {"role": "assistant", "content": "fine"}
TWO_TURNS = [HELLO, {"role": "assistant", "content": "good day"}, AND_YOU, FINE]
SYSTEM = {"role": "system", "content": "be kind"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nwell"}
FUNCTION = {"name": "get_weather", "arguments": {"city": "Ürümqi", "days": 3}}
CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "call12345", "type": "function", "function": FUNCTION}],
}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": "rain"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
NAMES = {
    name: value
    for name, value in vars(templates).items()
    if name.isupper() and name != "TEXT_CALLS"
}


def learnt(tokenizer: HFChatTokenizer, messages: Conversation, **settings: Any) -> str:
    tokens, mask = tokenizer.tokenize_conversation(messages, **settings)
    kept = [token for token, is_masked in zip(tokens, mask, strict=True) if not is_masked]
    return tokenizer.decode(kept, skip_special_tokens=False)


def directory_of(root: Path, template: str) -> Path:
    root.mkdir(exist_ok=True)
    return build_directory(root / "m", template, eos_token="<|endoftext|>")


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("QWEN3", TWO_TURNS, "good day<|im_end|><think>\n\n</think>\n\nfine<|im_end|>"),
        ("PHI3", TWO_TURNS, "good day<|im_end|>fine<|im_end|>"),
        ("PHI3", [*TWO_TURNS, HELLO], "good day<|im_end|>fine<|im_end|>"),
        ("MISTRAL", [SYSTEM, *TWO_TURNS], " good day<|endoftext|> fine<|endoftext|>"),
        ("LLAMA2", [SYSTEM, *TWO_TURNS], " good day <|endoftext|> fine <|endoftext|>"),
        ("LLAMA3_1", [SYSTEM, *TWO_TURNS], "good day<|im_end|>fine<|im_end|>"),
        ("GEMMA", TWO_TURNS, "good day<end>fine<end>"),
        ("SMOLLM3", TWO_TURNS, "good day<|im_end|>fine<|im_end|>"),
        (
            "GPT_OSS",
            TWO_TURNS,
            "<|channel|>final<|message|>good day<|im_end|>"
            "<|channel|>final<|message|>fine<|endoftext|>",
        ),
        # Thoughts of earlier turns are dropped, and so is the first one's of DeepSeek's last.
        (
            "QWEN3",
            [HELLO, THOUGHT, AND_YOU, THOUGHT],
            "well<|im_end|><think>\nhm\n</think>\n\nwell<|im_end|>",
        ),
        ("DEEPSEEK", [HELLO, THOUGHT, AND_YOU, THOUGHT], "well<|endoftext|>well<|endoftext|>"),
        # A thought is all the content, where the prompt has opened and closed one.
        (
            "NO_THOUGHT",
            [HELLO, {**FINE, "content": "so <think>hm</think>"}],
            "hm\n</think>\n\n<|im_end|>",
        ),
        ("NO_THOUGHT", [{**HELLO, "content": " "}, {**FINE, "content": ""}, HELLO, FINE],
         "<|im_end|>fine<|im_end|>"),
        (
            "QWEN3",
            [HELLO, {**FINE, "reasoning_content": "hm"}],
            "<think>\nhm\n</think>\n\nfine<|im_end|>",
        ),
        # The template asks what a question begins and ends with.
        (
            "QWEN3",
            [HELLO, FINE, {**HELLO, "content": "<tool_response>1</tool_response>"}, FINE],
            "<think>\n\n</think>\n\nfine<|im_end|>" * 2,
        ),
        # Contents that are empty, equal to another's, or have outer white space.
        ("PHI3", [HELLO, {**FINE, "content": ""}, AND_YOU, FINE], "<|im_end|>fine<|im_end|>"),
        ("QWEN3", [HELLO, {**FINE, "content": ""}, HELLO, FINE],
         "<|im_end|><think>\n\n</think>\n\nfine<|im_end|>"),
        ("PHI3", [HELLO, {**FINE, "content": "hello"}, HELLO, {**FINE, "content": "hello"}],
         "hello<|im_end|>hello<|im_end|>"),
        ("LLAMA2", [HELLO, {**FINE, "content": "  day\n"}, HELLO, FINE],
         " day <|endoftext|> fine <|endoftext|>"),
        ("QWEN3", [HELLO, {**FINE, "content": "\n ünïcödé 🙂 \n"}, HELLO, FINE],
         " ünïcödé 🙂 \n<|im_end|><think>\n\n</think>\n\nfine<|im_end|>"),
        ("QWEN3", [HELLO, {**FINE, "content": "say <|im_end|>\n now"}, HELLO, FINE],
         "say <|im_end|>\n now<|im_end|><think>\n\n</think>\n\nfine<|im_end|>"),
    ],
)  # fmt: skip
def test_each_answer_and_its_end_token_are_learnt_and_no_other_words(
    tmp_path: Path, template: str, messages: Conversation, expected: str
) -> None:
    tokenizer = hf_chat_tokenizer(str(directory_of(tmp_path, NAMES[template])))
    assert learnt(tokenizer, messages) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "QWEN3",
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ürümqi", "days": 3}}\n'
            "</tool_call><|im_end|>fine<|im_end|><think>\n\n</think>\n\nfine<|im_end|>",
        ),
        (
            "LLAMA3_1",
            '{"name": "get_weather", "parameters": {"city": "Ürümqi", "days": 3}}<|im_end|>'
            "fine<|im_end|>fine<|im_end|>",
        ),
        (
            "TEKKEN",
            '[CALLS][{"name": "get_weather", "arguments": {"city": "Ürümqi", "days": 3}}]'
            "<|endoftext|>fine<|endoftext|>fine<|endoftext|>",
        ),
    ],
)
def test_tool_calls_are_learnt(tmp_path: Path, template: str, expected: str) -> None:
    tokenizer = hf_chat_tokenizer(str(directory_of(tmp_path, NAMES[template])))
    messages = [HELLO, CALL, RESULT, FINE, HELLO, FINE]
    assert learnt(tokenizer, messages, tools=TOOLS) == expected


def test_arguments_may_be_text_as_in_openais_rows(tmp_path: Path) -> None:
    tokenizer = hf_chat_tokenizer(str(directory_of(tmp_path, templates.QWEN3)))
    text = {**FUNCTION, "arguments": '{"city": "Ürümqi", "days": 3}'}
    as_text = {**CALL, "content": None, "tool_calls": [{"function": text, "id": "call12345"}]}
    expected = tokenizer.tokenize_conversation([HELLO, CALL], tools=TOOLS)
    assert tokenizer.tokenize_conversation([HELLO, as_text], tools=TOOLS) == expected


def test_a_template_that_appends_arguments_as_text_gets_text(tmp_path: Path) -> None:
    tokenizer = hf_chat_tokenizer(str(directory_of(tmp_path, templates.TEXT_CALLS)))
    expected = '<|call|>get_weather {"city": "Ürümqi", "days": 3}<|endoftext|>'
    assert learnt(tokenizer, [HELLO, CALL]) == expected


CONVERSATIONS = {
    "turns": (TWO_TURNS, None),
    "system": ([SYSTEM, *TWO_TURNS], None),
    "call": ([HELLO, CALL, RESULT, FINE], TOOLS),
    "thought": ([HELLO, {**FINE, "reasoning_content": "hm"}, AND_YOU, THOUGHT], None),
    "user last": (TWO_TURNS[:3], None),
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_equal_transformers(tmp_path: Path, name: str, conversation: str) -> None:
    messages, tools = CONVERSATIONS[conversation]
    directory = directory_of(tmp_path, NAMES[name])
    ours, theirs = hf_chat_tokenizer(str(directory)), AutoTokenizer.from_pretrained(directory)
    if tools and "tools" not in NAMES[name]:
        with pytest.raises(UserError, match=r"the chat template (does not render|refuses)"):
            ours.tokenize_conversation(messages, tools=tools)
        return
    settings = {"tools": tools, "return_dict": False}
    try:
        expected = theirs.apply_chat_template(messages, **settings)
        prompt = theirs.apply_chat_template(messages, **settings, add_generation_prompt=True)
    except TemplateError:
        with pytest.raises(UserError, match="refuses this conversation"):
            ours.tokenize_conversation(messages, tools=tools)
        return
    assert ours.tokenize_conversation(messages, tools=tools)[0] == expected
    answer = [*messages, {"role": "assistant", "content": ""}]
    found = ours.tokenize_conversation(answer, tools=tools, add_end_tokens=False)
    assert found == (prompt, [True] * len(prompt))


@pytest.mark.parametrize(
    ("template", "messages", "tools", "message"),
    [
        (CHATML, [HELLO, FINE], TOOLS, "the chat template does not render the tools"),
        (
            "{% for m in messages %}{{ m.role ~ m.content }}{% endfor %}",
            [HELLO, CALL],
            None,
            r"does not render all tool_calls of message 1 \(assistant\)",
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}"
            "{% endfor %}",
            TWO_TURNS,
            None,
            r"message 1 \(assistant\) cannot be found .* does not render its content",
        ),
        (CHATML, [HELLO, CALL], None, r"does not render all tool_calls of message 1 \(assistant\)"),
        (templates.LLAMA3_1, [HELLO, {**CALL, "tool_calls": CALL["tool_calls"] * 2}], TOOLS,
         "refuses this conversation: only single tool-calls"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_express_is_refused_by_name(
    tmp_path: Path, template: str, messages: Conversation, tools: Any, message: str
) -> None:
    tokenizer = hf_chat_tokenizer(str(directory_of(tmp_path, template)))
    with pytest.raises(UserError, match=message):
        tokenizer.tokenize_conversation(messages, tools=tools)


def test_flags_choose_what_is_learnt(tmp_path: Path) -> None:
    tokenizer = hf_chat_tokenizer(str(directory_of(tmp_path, templates.PHI3)))
    last = learnt(tokenizer, TWO_TURNS, learnt=[False, False, False, True])
    assert last == "fine<|im_end|>"
    user = learnt(tokenizer, TWO_TURNS, learnt=[False, False, True, False])
    assert user == "<|user|>\nand you <|im_end|><|im_end|>"
    assert learnt(tokenizer, TWO_TURNS, learnt=[False] * 4) == ""
    with pytest.raises(UserError, match="learnt has 1 values for 4 messages"):
        tokenizer.tokenize_conversation(TWO_TURNS, learnt=[True])


def test_a_content_that_is_left_out_of_a_prompt_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    no_system = "{% set messages = messages[1:] %}" + CHATML.replace("loop.first and", "false and")
    tokenizer = hf_chat_tokenizer(str(directory_of(tmp_path, no_system)))
    for _ in range(2):
        note = {"role": "note", "content": "be kind"}
        assert learnt(tokenizer, [note, *TWO_TURNS]) == "good day<|im_end|>fine<|im_end|>"
    assert caplog.text.count("leaves out the content of message 0 (note)") == 1


def test_answers_that_end_with_no_token_to_stop_at_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learnt_spans._warn_once.cache_clear()
    plain = "{% for m in messages %}{{ '### ' + m.role + ' ' + m.content + '\n' }}{% endfor %}"
    learnt(hf_chat_tokenizer(str(directory_of(tmp_path / "a", CHATML))), TWO_TURNS)
    assert "learn to stop" not in caplog.text
    assert "fine" in learnt(hf_chat_tokenizer(str(directory_of(tmp_path, plain))), TWO_TURNS)
    assert "the model does not learn to stop" in caplog.text


def test_private_use_characters_in_a_text_are_kept(tmp_path: Path) -> None:
    tokenizer = hf_chat_tokenizer(str(directory_of(tmp_path, templates.QWEN3)))
    odd = {**FINE, "content": "a \U000f0001\U000f0002 b"}
    expected = "a \U000f0001\U000f0002 b<|im_end|><think>\n\n</think>\n\nfine<|im_end|>"
    assert learnt(tokenizer, [HELLO, odd, HELLO, FINE]) == expected


def test_torchtunes_messages_are_learnt_where_they_are_not_masked(tmp_path: Path) -> None:
    tokenizer = hf_chat_tokenizer(str(directory_of(tmp_path, templates.QWEN3)))
    messages = [Message(role=m["role"], content=m["content"], masked=True) for m in TWO_TURNS]
    messages[1].masked = False
    flags = [False, True, False, False]
    assert tokenizer.tokenize_messages(messages) == tokenizer.tokenize_conversation(
        TWO_TURNS, learnt=flags
    )


PIECES = ["<think>", "</think>\n", "\n\n", "  ", "<|im_end|>", "<|im_start|>assistant\n", "[/INST]",
          "</s>", "{{ x }}", "é🙂", "<tool_call>", '{"a": 1}', "<|channel|>", "None"]  # fmt: skip


def some_content(choose: random.Random, word: str) -> str:
    before, after = (choose.choices(PIECES, k=choose.randint(0, 3)) for _ in range(2))
    return "".join([*before, word, *after])


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"LLAMA2"}))  # it alone has fixed roles
def test_of_any_contents_all_words_of_answers_are_learnt_and_none_of_questions(
    tmp_path: Path, name: str
) -> None:
    tokenizer = hf_chat_tokenizer(str(directory_of(tmp_path, NAMES[name])))
    choose, dropped = random.Random(name), 0
    for _ in range(12):
        roles = ["user", "assistant"] * choose.randint(1, 3)
        words = [f"{role[0]}{i}word" for i, role in enumerate(roles)]
        messages = [
            {"role": role, "content": some_content(choose, word)}
            for role, word in zip(roles, words, strict=True)
        ]
        try:
            tokens, mask = tokenizer.tokenize_conversation(messages)
        except UserError:  # all of an answer is a thought, which the template drops
            dropped += 1
            continue
        whole = tokenizer.decode(tokens, skip_special_tokens=False)
        found = [t for t, is_masked in zip(tokens, mask, strict=True) if not is_masked]
        text = tokenizer.decode(found, skip_special_tokens=False)
        for role, word in zip(roles, words, strict=True):
            assert text.count(word) == (whole.count(word) if role == "assistant" else 0), messages
    assert dropped <= (3 if "</think>" in NAMES[name] else 0)
