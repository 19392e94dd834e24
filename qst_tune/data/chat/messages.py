"""Messages as chat templates take them: dicts with role, content, tool calls and thoughts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchtune.data import Message as TorchtuneMessage

from qst_tune.data.values import JsonObject, from_json, kind_of, quoted, text_of, without_nulls
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
# Keys of a message's thought; most templates read the first, gpt-oss's the second.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
# Further keys of a row's message that chat templates read.
_FURTHER = ("name", "tool_call_id", "reasoning_content", "thinking")
_ONLY_TEXT = "only text can be tokenized; for others use the model's own torchtune transform"


@dataclass(frozen=True)
class Conversation:
    """Messages and which of them are learnt."""

    messages: list[Message]  # as transformers' apply_chat_template takes them
    learnt: list[bool]  # for each message
    tools: list[Any] | None = None  # JSON schemas of the tools that a template may name


def read_conversation(value: object, column: str, tools: object = None) -> Conversation:
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


def read_tools(value: object) -> list[Any] | None:
    """Read a list of JSON schemas, or JSON of one; None if there is none."""
    tools = from_json(value, "tools") if value not in ("", None) else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"column 'tools' is {kind_of(tools)}: it must be a list of JSON schemas")
    return [without_nulls(tool) for tool in tools]


def from_torchtune(messages: Sequence[TorchtuneMessage]) -> list[Message]:
    """Convert torchtune's messages to dicts; a message with an image is a UserError."""
    for index, message in enumerate(messages):
        if message.contains_media:
            raise UserError(f"messages[{index}] contains an image or another medium: {_ONLY_TEXT}")
    return [{"role": ROLES.get(m.role, m.role), "content": m.text_content} for m in messages]


def check_messages(messages: Sequence[JsonObject]) -> list[Message]:
    """Normalise messages for chat templates; a malformed one is a UserError that names it.

    As in transformers' ``apply_chat_template``, keys whose value is None are left out, and a
    thought is passed under each of its names. Unlike there, text parts are joined to one text, an
    empty list of tool calls is left out, and arguments in JSON text become a dict: OpenAI's rows
    have text, and most templates write ``arguments | tojson``, which would quote it again.
    """
    if not messages:
        raise UserError("the conversation has no message; at least one is needed")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def call_variants(messages: Sequence[JsonObject]) -> Iterator[list[Message]]:
    """Yield checked messages with tool calls in the forms that templates want, first as they are.

    Most take a dict of arguments and no content; DeepSeek's append arguments as text, as OpenAI's
    rows have them, and ask whether content is None; some append the content in any case.
    """
    yield [dict(message) for message in messages]
    if any("tool_calls" in message for message in messages):
        yield [_variant(message, as_text=True) for message in messages]
        for empty in (None, ""):
            for as_text in (False, True):
                yield [_variant(m, as_text=as_text, content=empty) for m in messages]


def _variant(message: JsonObject, *, as_text: bool, **filled: object) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    calls = [_as_text(call) for call in calls] if as_text else calls
    return {**filled, **message, "tool_calls": calls}


def _as_text(call: JsonObject) -> Message:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _read_message(item: object, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise UserError(f"{where} is {kind_of(item)}: a message has a role and a content")
    name = item.get("role", item.get("from"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise UserError(
            f"{where}: role {quoted(name)} is unknown: use system, user (human), assistant (gpt) "
            "or tool"
        )
    content = item["content"] if item.get("content") is not None else item.get("value")
    further = {key: item[key] for key in _FURTHER if item.get(key) is not None}
    if name == "function_call":
        return {"role": role, "tool_calls": _tidy_calls([content], where), **further}
    of_old_form = [item["function_call"]] if item.get("function_call") else []
    calls = _tidy_calls(item.get("tool_calls") or of_old_form, where)
    message: Message = {"role": role, **further} | ({"tool_calls": calls} if calls else {})
    if content is None and calls:  # OpenAI's rows: the call is the whole message
        return message
    return message | {"content": _join_text(content, f"{where}.content")}


def _weight(item: JsonObject, where: str) -> int:
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise UserError(f"{where}.weight is {quoted(weight)}: it must be 0 (not learnt) or 1")
    return 1 if weight is None else int(weight)


def _check_message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise UserError(f"{where} is {kind_of(message)}: it must be a dict with role and content")
    checked = {key: value for key, value in message.items() if value is not None}
    role = checked.get("role")
    if not isinstance(role, str) or not role:
        raise UserError(f"{where} has the role {quoted(role)}; name who speaks, such as user")
    if "content" in checked:
        checked["content"] = _join_text(checked["content"], f"{where}.content")
    if checked.get("tool_calls"):
        checked["tool_calls"] = _check_calls(checked["tool_calls"], where)
    else:
        checked.pop("tool_calls", None)
        if "content" not in checked:
            raise UserError(f"{where} ({role}) has neither content nor tool_calls")
    thought = next((checked[name] for name in _THOUGHTS if name in checked), None)
    if thought is not None:
        checked = {"thinking": thought, **checked, "reasoning_content": thought}
    return checked


def _join_text(content: object, where: str) -> str:
    """Return text as it is, and OpenAI's list of text parts as one text."""
    if not isinstance(content, list) or not content:
        return text_of(content, where)
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text":
            raise UserError(f"{where} has a part of type {quoted(kind)}: {_ONLY_TEXT}")
        texts.append(text_of(part.get("text") if isinstance(part, Mapping) else part, where))
    return "".join(texts)


def _tidy_calls(calls: object, where: str) -> list[Message]:
    """The calls with only the keys that templates read."""
    tidy = []
    for call in without_nulls(_check_calls(calls, where)):
        function = {key: call["function"][key] for key in ("name", "arguments")}
        id_of = {"id": call["id"]} if "id" in call else {}
        tidy.append({"type": "function", "function": function, **id_of})
    return tidy


def _check_calls(calls: object, message: str) -> list[Message]:
    """Return tool calls as templates take them: each with its arguments as a dict."""
    where = f"{message}.tool_calls"
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UserError(f"{where} is {kind_of(calls)}: it must be a list of calls")
    places = [f"{where}[{i}]" for i in range(len(calls))]
    pairs = zip(calls, places, strict=True)
    return [_check_call(from_json(call, place), place) for call, place in pairs]


def _check_call(call: Any, where: str) -> Message:
    # OpenAI's form has the function in a dict of its own; some rows have its keys alone.
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(
            f'{where} is {kind_of(call)}: write {{"type": "function", "function": {{"name": "f", '
            '"arguments": {}}}'
        )
    arguments = from_json(function.get("arguments") or {}, f"{where}.arguments")
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where}.arguments is {kind_of(arguments)}: it must be an object")
    named = {**({} if function is call else function), "name": function["name"]}
    named["arguments"] = dict(arguments)
    rest = {key: value for key, value in call.items() if value is not None and key not in named}
    return {"type": "function", **rest, "function": named}
