"""A conversation as chat templates take it, read from OpenAI's or ShareGPT's form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qst_tune.data.chat_messages import check_calls, join_text
from qst_tune.data.json_values import from_json, kind_of, without_nulls
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
# Further keys of a message that chat templates read.
_FURTHER = ("name", "tool_call_id", "reasoning_content", "thinking")


@dataclass(frozen=True)
class Conversation:
    """Messages and which of them are learnt."""

    messages: list[Message]  # as transformers' apply_chat_template takes them
    learnt: list[bool]  # for each message
    tools: list[Any] | None = None  # JSON schemas of the tools that a template may name


def read_conversation(value: Any, column: str, tools: Any = None) -> Conversation:
    """Read a list of messages, or its JSON: OpenAI's (role, content) or ShareGPT's (from, value).

    Assistant messages are learnt, except those with ``weight: 0``. ``tools`` is as in
    :func:`read_tools`. A malformed message is a UserError that names it and the fix.
    """
    items = from_json(value, column)
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
    """Read a list of JSON schemas, or JSON of one; None if there is none."""
    tools = from_json(value, "tools") if value not in ("", None) else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"column 'tools' is {kind_of(tools)}: it must be a list of JSON schemas")
    return [without_nulls(tool) for tool in tools]


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
        return {"role": role, "tool_calls": _tool_calls([content], where), **further}
    of_old_form = [item["function_call"]] if item.get("function_call") else []
    calls = _tool_calls(item.get("tool_calls") or of_old_form, where)
    message: Message = {"role": role, **further} | ({"tool_calls": calls} if calls else {})
    if content is None and calls:  # OpenAI's rows: the call is the whole message
        return message
    return message | {"content": join_text(content, f"{where}.content")}


def _tool_calls(calls: Any, where: str) -> list[Message]:
    """The calls with only the keys that templates read."""
    tidy = []
    for call in without_nulls(check_calls(calls, f"{where}.tool_calls")):
        function = {key: call["function"][key] for key in ("name", "arguments")}
        id_of = {"id": call["id"]} if "id" in call else {}
        tidy.append({"type": "function", "function": function, **id_of})
    return tidy


def _weight(item: Mapping[str, Any], where: str) -> int:
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise UserError(f"{where}.weight is {weight!r}: it must be 0 (not learnt) or 1")
    return 1 if weight is None else int(weight)
