"""Messages as chat templates take them: dicts with role, content, tool calls and thoughts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchtune.data import Message

from qst_tune.data.json_values import from_json, kind_of, text_of
from qst_tune.errors import UserError

# Hugging Face templates have another name than torchtune for the return of a tool call.
_HF_ROLES = {"ipython": "tool"}
# Keys of a message's thought; most templates read the first, gpt-oss's the second.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")

_ONLY_TEXT = "only text can be tokenized; for others use the model's own torchtune transform"


def from_torchtune(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Convert torchtune's messages to dicts; a message with an image is a UserError."""
    for index, message in enumerate(messages):
        if message.contains_media:
            raise UserError(f"messages[{index}] contains an image or another medium: {_ONLY_TEXT}")
    return [
        {"role": _HF_ROLES.get(message.role, message.role), "content": message.text_content}
        for message in messages
    ]


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Normalise messages for chat templates; a malformed one is a UserError that names it.

    As in transformers' ``apply_chat_template``, keys whose value is None are left out, and a
    thought is passed under each of its names. Unlike there, text parts are joined to one text, an
    empty list of tool calls is left out, and arguments in JSON text become a dict: OpenAI's rows
    have text, and most templates write ``arguments | tojson``, which would quote it again.
    """
    if not messages:
        raise UserError("the conversation has no message; at least one is needed")
    return [_check_message(index, message) for index, message in enumerate(messages)]


def call_variants(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
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


def _variant(message: Mapping[str, Any], *, as_text: bool, **filled: Any) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    calls = [_as_text(call) for call in calls] if as_text else calls
    return {**filled, **message, "tool_calls": calls}


def _as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _check_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise UserError(f"{where} is {kind_of(message)}: it must be a dict with role and content")
    checked = {key: value for key, value in message.items() if value is not None}
    role = checked.get("role")
    if not isinstance(role, str) or not role:
        raise UserError(f"{where} has the role {role!r}; name who speaks, such as user")
    if "content" in checked:
        checked["content"] = join_text(checked["content"], f"{where}.content")
    if checked.get("tool_calls"):
        checked["tool_calls"] = check_calls(checked["tool_calls"], f"{where}.tool_calls")
    else:
        checked.pop("tool_calls", None)
        if "content" not in checked:
            raise UserError(f"{where} ({role}) has neither content nor tool_calls")
    thought = next((checked[name] for name in THOUGHTS if name in checked), None)
    if thought is not None:
        checked = {"thinking": thought, **checked, "reasoning_content": thought}
    return checked


def join_text(content: Any, where: str) -> str:
    """Return text as it is, and OpenAI's list of text parts as one text."""
    if not isinstance(content, list) or not content:
        return text_of(content, where)
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text":
            raise UserError(f"{where} has a part of type {kind!r}: {_ONLY_TEXT}")
        texts.append(text_of(part.get("text") if isinstance(part, Mapping) else part, where))
    return "".join(texts)


def check_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls as templates take them: each with its arguments as a dict."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UserError(f"{where} is {kind_of(calls)}: it must be a list of calls")
    return [
        _check_call(from_json(call, f"{where}[{i}]"), f"{where}[{i}]")
        for i, call in enumerate(calls)
    ]


def _check_call(call: Any, where: str) -> dict[str, Any]:
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
