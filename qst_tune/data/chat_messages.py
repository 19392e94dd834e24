"""Messages as chat templates take them: dicts with role, content, tool calls and thoughts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchtune.data import Message

from qst_tune.errors import UserError

# Hugging Face templates know the return of a tool call under another name than torchtune.
_HF_ROLES = {"ipython": "tool"}
# The names a message's thought is passed under; templates read the first, gpt-oss's the second.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def from_torchtune(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Convert torchtune's messages.

    Args:
        messages (Sequence[Message]): text only.

    Returns:
        list[dict[str, Any]]: role and content.

    Raises:
        UserError: if a message has an image.
    """
    for index, message in enumerate(messages):
        if message.contains_media:
            raise _no_image(index, message.role)
    return [
        {"role": _HF_ROLES.get(message.role, message.role), "content": message.text_content}
        for message in messages
    ]


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bring messages into the form that templates expect.

    As in transformers' ``apply_chat_template``, keys whose value is None are left out, and a
    thought is passed under each of its names. Unlike there, text parts are joined to one text, an
    empty list of tool calls is left out, and arguments that are JSON text become a dict: OpenAI's
    rows have text, and most templates write ``arguments | tojson``, which would quote it again.

    Args:
        messages (Sequence[Mapping[str, Any]]): at least one.

    Returns:
        list[dict[str, Any]]: copies.

    Raises:
        UserError: naming the message that has no role, an image, or malformed tool calls.
    """
    if not messages:
        raise UserError("the conversation has no message; at least one is needed")
    return [_check_message(index, message) for index, message in enumerate(messages)]


def call_variants(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages in the forms that templates want tool calls in.

    Most take a dict of arguments and no content; DeepSeek's append arguments as text, as OpenAI's
    rows have them, and ask whether content is None; some append the content in any case.

    Args:
        messages (Sequence[Mapping[str, Any]]): from :func:`check_messages`.

    Yields:
        list[dict[str, Any]]: as they are first; only once if there is no tool call.
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
    if not isinstance(message, Mapping):
        raise UserError(f"message {index} is {message!r}, not a dict with role and content")
    checked = {key: value for key, value in message.items() if value is not None}
    role = checked.get("role")
    if not isinstance(role, str) or not role:
        raise UserError(f"message {index} has the role {role!r}; name who speaks, such as user")
    if "content" in checked:
        checked["content"] = _text(index, role, checked["content"])
    if not checked.get("tool_calls"):
        checked.pop("tool_calls", None)
        if "content" not in checked:
            raise UserError(f"message {index} ({role}) has neither content nor tool_calls")
    else:
        checked["tool_calls"] = _check_calls(index, checked["tool_calls"])
    thought = next((checked[name] for name in THOUGHTS if name in checked), None)
    if thought is not None:
        checked = {"thinking": thought, **checked, "reasoning_content": thought}
    return checked


def _text(index: int, role: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    if any(isinstance(part, Mapping) and part.get("type", "text") != "text" for part in parts):
        raise _no_image(index, role)
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"the content of message {index} ({role}) is {str(content)[:60]!r}; it must be text, "
            'or a list of {"type": "text", "text": ...}'
        )
    return "".join(map(str, texts))


def _check_calls(index: int, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UserError(f"tool_calls of message {index} is {calls!r}; it must be a list of calls")
    return [_check_call(f"tool call {i} of message {index}", call) for i, call in enumerate(calls)]


def _check_call(what: str, call: Any) -> dict[str, Any]:
    # OpenAI's form has the function in a dict of its own; some rows have its keys alone.
    is_call = isinstance(call, Mapping)
    function = call.get("function", call) if is_call else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(
            f'{what} is {str(call)[:80]!r}; write {{"type": "function", "function": {{"name": '
            '"f", "arguments": {}}}'
        )
    named = {**function, "arguments": _arguments(what, function.get("arguments"))}
    if function is call:
        named = {key: named[key] for key in ("name", "arguments")}
    rest = {key: value for key, value in call.items() if value is not None and key not in named}
    return {"type": "function", **rest, "function": named}


def _arguments(what: str, arguments: Any) -> dict[str, Any]:
    if arguments is None or arguments == "":
        return {}
    value = arguments
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, Mapping):
        raise UserError(
            f"the arguments of {what} are {str(arguments)[:80]!r}; they must be a JSON object"
        )
    return dict(value)


def _no_image(index: int, role: str) -> UserError:
    return UserError(
        f"message {index} ({role}) contains an image or another medium; this tokenizer is for "
        "text, use the model's own torchtune transform"
    )
