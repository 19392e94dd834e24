"""Messages in the form that chat templates take, and malformed ones by name."""

import json
import re
from typing import Any

import pytest
from torchtune.data import Message

from qst_tune.data.chat.messages import (
    call_variants,
    check_messages,
    from_torchtune,
    read_conversation,
    read_tools,
)
from qst_tune.errors import UserError

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def checked(**message: Any) -> dict[str, Any]:
    return check_messages([{"role": "assistant", **message}])[0]


def test_keys_of_null_and_empty_calls_are_left_out() -> None:
    message = checked(content="a", name=None, tool_calls=[])
    assert message == {"role": "assistant", "content": "a"}
    assert "content" not in checked(content=None, tool_calls=[CALL])


def test_keys_keep_their_order_for_templates_that_write_the_whole_message() -> None:
    message = checked(tool_calls=[CALL], content="a")
    assert list(message) == ["role", "tool_calls", "content"]


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert checked(content=parts)["content"] == "a b"


def test_a_thought_has_every_name_that_templates_read() -> None:
    message = checked(content="a", thinking="hm")
    assert message["reasoning_content"] == message["thinking"] == "hm"


def assistant(tool_calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": tool_calls}


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {**CALL, "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "c1", "name": "f", "arguments": '{"a": 1}'},
    ],
    ids=["dict", "text", "bare"],
)
def test_arguments_become_a_dict(call: Any) -> None:
    assert checked(tool_calls=[call])["tool_calls"] == [CALL]


def test_arguments_may_be_absent() -> None:
    call = {"type": "function", "function": {"name": "f"}}
    assert checked(tool_calls=[call])["tool_calls"][0]["function"]["arguments"] == {}


def test_variants_of_calls_begin_with_the_usual_form_and_end_with_an_empty_content() -> None:
    messages = check_messages([{"role": "assistant", "tool_calls": [CALL]}])
    variants = [variant[0] for variant in call_variants(messages)]
    assert variants[0] == messages[0]
    text = {**CALL, "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert {"role": "assistant", "content": None, "tool_calls": [text]} in variants
    assert variants[-1] == {"role": "assistant", "content": "", "tool_calls": [text]}
    plain = check_messages([{"role": "user", "content": "a"}])
    assert list(call_variants(plain)) == [plain]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the conversation has no message"),
        (["hello"], "messages[0] is text ('hello'): it must be a dict with role and content"),
        ([{"content": "a"}], "messages[0] has the role None; name who speaks"),
        ([{"role": 3, "content": "a"}], "messages[0] has the role 3"),
        ([{"role": "user"}], "messages[0] (user) has neither content nor tool_calls"),
        ([{"role": "user", "content": None}], "has neither content nor tool_calls"),
        ([assistant([])], "messages[0] (assistant) has neither content nor tool_calls"),
        ([{"role": "user", "content": 5}], "messages[0].content is a number (5)"),
        ([{"role": "user", "content": [{"text": 5}]}], "messages[0].content is a number (5)"),
        (
            [{"role": "user", "content": [{"type": "image", "image": "x"}]}],
            "messages[0].content has a part of type 'image': only text",
        ),
        ([assistant("f")], "messages[0].tool_calls is text ('f'): it must be a list"),
        ([assistant([3])], "messages[0].tool_calls[0] is a number (3): write"),
        ([assistant(["f"])], "messages[0].tool_calls[0] is text that is not JSON"),
        ([assistant([{"function": {"arguments": {}}}])], "messages[0].tool_calls[0] is a dict"),
        (
            [assistant([{"name": "f", "arguments": "{a: 1}"}])],
            "messages[0].tool_calls[0].arguments is text that is not JSON",
        ),
        (
            [assistant([{"name": "f", "arguments": "[1]"}])],
            "messages[0].tool_calls[0].arguments is a list ([1]): it must be an object",
        ),
    ],
)
def test_malformed_messages_are_refused_by_name(messages: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_messages(messages)


def test_torchtunes_roles_become_hugging_faces() -> None:
    messages = [Message(role="user", content="a"), Message(role="ipython", content="1")]
    assert from_torchtune(messages) == [
        {"role": "user", "content": "a"},
        {"role": "tool", "content": "1"},
    ]


def test_images_of_torchtunes_messages_are_refused() -> None:
    message = Message(role="user", content=[{"type": "image", "content": None}])
    with pytest.raises(UserError, match=r"messages\[0\] contains an image"):
        from_torchtune([message])


USER = {"role": "user", "content": "hi"}
FUNCTION = {"name": "f", "arguments": {"city": "Oslo"}}
ROW_CALL = {"type": "function", "function": FUNCTION}


def answer(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", **keys}


@pytest.mark.parametrize(
    "message",
    [
        answer(
            content=None,
            tool_calls=[{**ROW_CALL, "function": {**FUNCTION, "arguments": '{"city": "Oslo"}'}}],
        ),
        answer(
            tool_calls=[{"function": {**FUNCTION, "arguments": {"city": "Oslo", "land": None}}}]
        ),
        answer(content=None, tool_calls=None, function_call=FUNCTION),
        {"from": "function_call", "value": json.dumps(FUNCTION)},
    ],
    ids=["OpenAI", "Arrow", "OpenAI's older form", "ShareGPT"],
)
def test_tool_call_is_a_message_without_text(message: dict[str, Any]) -> None:
    conversation = read_conversation([USER, message], "messages")
    assert conversation.messages == [USER, answer(tool_calls=[ROW_CALL])]
    assert conversation.learnt == [False, True]


def test_answers_of_tools_and_thoughts_are_kept() -> None:
    reply = {"role": "tool", "content": "12", "tool_call_id": "c1"}
    thought = answer(content="a", reasoning_content="because")
    extra = {**thought, "timestamp": 3, "name": None}
    assert read_conversation([USER, reply, extra], "messages").messages == [USER, reply, thought]


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("gpt", "assistant"), ("developer", "system"), ("observation", "tool")],
)
def test_other_names_of_roles(name: str, role: str) -> None:
    for item in ({"from": name, "value": "a"}, {"role": name, "content": "a"}):
        (message,) = read_conversation([item], "conversations").messages
        assert message == {"role": role, "content": "a"}


def test_tools_are_schemas_or_their_json() -> None:
    schema = {"type": "function", "function": {"name": "f", "parameters": {"x": None}}}
    clean = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert read_tools([schema]) == read_tools(json.dumps([schema])) == clean
    assert read_tools(None) is read_tools("") is read_tools([]) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "column 'm' is empty: it must be a list of messages"),
        (None, "column 'm' is null: it must be a list of messages"),
        ("hello", "m is text that is not JSON"),
        (7, "column 'm' is a number (7)"),
        (["hi"], "m[0] is text ('hi'): a message has a role and a content"),
        (
            [{**USER, "role": "narrator"}],
            "m[0]: role 'narrator' is unknown: use system, user (human)",
        ),
        ([{"content": "a"}], "m[0]: role None is unknown"),
        ([USER, answer(content=None)], "m[1].content is null: it must be text"),
        ([{**USER, "content": 3.5}], "m[0].content is a number (3.5): it must be text"),
        (
            [{**USER, "content": [{"type": "image_url"}]}],
            "m[0].content has a part of type 'image_url'",
        ),
        ([answer(content="a", weight=2)], "m[0].weight is 2: it must be 0 (not learnt) or 1"),
        (
            [answer(tool_calls="f()")],
            "m[0].tool_calls is text ('f()'): it must be a list of calls",
        ),
        ([answer(tool_calls=[{"id": 1}])], "m[0].tool_calls[0] is a dict ({'id': 1}): write"),
        (
            [answer(tool_calls=[{"function": {**FUNCTION, "arguments": "city"}}])],
            "m[0].tool_calls[0].arguments is text that is not JSON",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_conversation(value, "m")
    assert message in str(error.value)
