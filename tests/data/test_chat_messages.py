"""Messages in the form that chat templates take, and malformed ones by name."""

import re
from typing import Any

import pytest
from torchtune.data import Message

from qst_tune.data.chat.messages import call_variants, check_messages, from_torchtune
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
