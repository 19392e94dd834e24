"""One conversation in the form that chat templates take, from OpenAI's or ShareGPT's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qst_tune.errors import UserError

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # ShareGPT: the value is the call
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
# Of a message, besides role and content, what chat templates read.
_FURTHER = ("name", "tool_call_id", "reasoning_content", "thinking")


@dataclass(frozen=True)
class Conversation:
    """Messages, and which of them are learnt.

    Args:
        messages (list[Message]): as transformers' ``apply_chat_template`` takes them.
        learnt (list[bool]): for each message.
        tools (list[Any] | None): JSON schemas of the tools that a template may name.
    """

    messages: list[Message]
    learnt: list[bool]
    tools: list[Any] | None = None


def read_conversation(value: Any, column: str, tools: Any = None) -> Conversation:
    """Read a list of messages.

    Args:
        value (Any): messages with role and content (OpenAI) or from and value (ShareGPT), or
            JSON of such a list.
        column (str): where they are, for messages.
        tools (Any): a list of JSON schemas, or JSON of one; None or empty for none.

    Returns:
        Conversation: assistant messages are learnt, except those with ``weight: 0``.

    Raises:
        UserError: if it is not one, naming the message and the fix.
    """
    items = _from_json(value, column)
    if not isinstance(items, list | tuple) or not items:
        raise UserError(f"column {column!r} is {kind_of(items)}: it must be a list of messages")
    messages, learnt = [], []
    for index, item in enumerate(items):
        where = f"{column}[{index}]"
        messages.append(_read_message(item, where))
        is_answer = messages[-1]["role"] == "assistant"
        learnt.append(is_answer and _weight(item, where) != 0)
    return Conversation(messages, learnt, read_tools(tools))


def read_tools(value: Any) -> list[Any] | None:
    """Read the column of tools.

    Args:
        value (Any): a list of JSON schemas, or JSON of one.

    Returns:
        list[Any] | None: None if there is none.

    Raises:
        UserError: if it is something else.
    """
    tools = _from_json(value, "tools") if value not in ("", None) else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"column 'tools' is {kind_of(tools)}: it must be a list of JSON schemas")
    return [without_nulls(tool) for tool in tools]


def text_of(value: Any, where: str) -> str:
    """Return a value that must be text.

    Args:
        value (Any): of a row.
        where (str): its column, for messages.

    Returns:
        str: the same.

    Raises:
        UserError: if it is not text.
    """
    if isinstance(value, str):
        return value
    raise UserError(f"{where} is {kind_of(value)}: it must be text")


def kind_of(value: Any) -> str:
    """Describe a value of a wrong type.

    Args:
        value (Any): of a row.

    Returns:
        str: its kind and, where it is short, itself.
    """
    if value is None:
        return "null"
    if value == [] or value == {} or value == "":
        return "empty"
    kinds = {bool: "a truth value", int: "a number", float: "a number", str: "text"}
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    shown = repr(value)
    return f"{kind} ({shown})" if len(shown) <= 40 else kind


def without_nulls(value: Any) -> Any:
    """Leave out keys whose value is null: Arrow gives each object the keys of all others.

    Args:
        value (Any): of JSON or Arrow.

    Returns:
        Any: a copy.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise UserError(f"{where} is {kind_of(item)}: a message has a role and a content")
    name = item.get("role", item.get("from"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise UserError(
            f"{where}: role {name!r} is unknown: use system, user (human), assistant (gpt) or tool"
        )
    content = item["content"] if item.get("content") is not None else item.get("value")
    further = {key: item[key] for key in _FURTHER if item.get(key) is not None}
    if name == "function_call":
        return {"role": role, "tool_calls": [_call(content, where)], **further}
    calls = _tool_calls(item, where)
    message: Message = {"role": role, **further} | ({"tool_calls": calls} if calls else {})
    if content is None and calls:  # OpenAI's rows: the call is the whole message
        return message
    return message | {"content": _content(content, f"{where}.content")}


def _content(value: Any, where: str) -> str:
    """Text, or OpenAI's list of parts that are all text."""
    if not isinstance(value, list) or not value:
        return text_of(value, where)
    parts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text":
            raise UserError(f"{where} has a part of type {kind!r}: only text can be learnt")
        parts.append(text_of(part.get("text") if isinstance(part, Mapping) else part, where))
    return "".join(parts)


def _tool_calls(item: Mapping[str, Any], where: str) -> list[Message]:
    calls = item.get("tool_calls") or ([item["function_call"]] if item.get("function_call") else [])
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UserError(f"{where}.tool_calls is {kind_of(calls)}: it must be a list of calls")
    return [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _call(value: Any, where: str) -> Message:
    """A call as templates take it: ``arguments`` is an object, which OpenAI writes as JSON."""
    call = _from_json(value, where)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} is {kind_of(call)}: a call has a function with name, arguments")
    arguments = _from_json(function.get("arguments") or {}, f"{where}.arguments")
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where}.arguments is {kind_of(arguments)}: it must be an object")
    further = {"id": call["id"]} if call.get("id") is not None else {}
    named = {"name": function["name"], "arguments": without_nulls(arguments)}
    return {"type": "function", "function": named, **further}


def _weight(item: Mapping[str, Any], where: str) -> int:
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise UserError(f"{where}.weight is {weight!r}: it must be 0 (not learnt) or 1")
    return 1 if weight is None else int(weight)


def _from_json(value: Any, where: str) -> Any:
    """Parse what CSV, or OpenAI's ``arguments``, hold as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise UserError(f"{where} is text that is not JSON: {error}") from error
