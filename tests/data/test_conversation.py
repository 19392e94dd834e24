"""Messages of OpenAI's and ShareGPT's forms become those of chat templates, or are refused."""

import json
from typing import Any

import pytest

from qst_tune.data.chat.messages import read_conversation, read_tools
from qst_tune.errors import UserError

USER = {"role": "user", "content": "hi"}
FUNCTION = {"name": "f", "arguments": {"city": "Oslo"}}
CALL = {"type": "function", "function": FUNCTION}


def assistant(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", **keys}


@pytest.mark.parametrize(
    "message",
    [
        assistant(
            content=None,
            tool_calls=[{**CALL, "function": {**FUNCTION, "arguments": '{"city": "Oslo"}'}}],
        ),
        assistant(
            tool_calls=[{"function": {**FUNCTION, "arguments": {"city": "Oslo", "land": None}}}]
        ),
        assistant(content=None, tool_calls=None, function_call=FUNCTION),
        {"from": "function_call", "value": json.dumps(FUNCTION)},
    ],
    ids=["OpenAI", "Arrow", "OpenAI's older form", "ShareGPT"],
)
def test_tool_call_is_a_message_without_text(message: dict[str, Any]) -> None:
    conversation = read_conversation([USER, message], "messages")
    assert conversation.messages == [USER, assistant(tool_calls=[CALL])]
    assert conversation.learnt == [False, True]


def test_answers_of_tools_and_thoughts_are_kept() -> None:
    answer = {"role": "tool", "content": "12", "tool_call_id": "c1"}
    thought = assistant(content="a", reasoning_content="because")
    extra = {**thought, "timestamp": 3, "name": None}
    assert read_conversation([USER, answer, extra], "messages").messages == [USER, answer, thought]


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
        ([USER, assistant(content=None)], "m[1].content is null: it must be text"),
        ([{**USER, "content": 3.5}], "m[0].content is a number (3.5): it must be text"),
        (
            [{**USER, "content": [{"type": "image_url"}]}],
            "m[0].content has a part of type 'image_url'",
        ),
        ([assistant(content="a", weight=2)], "m[0].weight is 2: it must be 0 (not learnt) or 1"),
        (
            [assistant(tool_calls="f()")],
            "m[0].tool_calls is text ('f()'): it must be a list of calls",
        ),
        ([assistant(tool_calls=[{"id": 1}])], "m[0].tool_calls[0] is a dict ({'id': 1}): write"),
        (
            [assistant(tool_calls=[{"function": {**FUNCTION, "arguments": "city"}}])],
            "m[0].tool_calls[0].arguments is text that is not JSON",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_conversation(value, "m")
    assert message in str(error.value)
