"""Marks around the texts of messages, which show where a chat template puts each of them.

A mark is one private-use character that no text has. It is no white space, so templates that trim a
content trim the same; and a rendering without its marks is compared with the real one.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qst_tune.data.chat.messages import Message
from qst_tune.data.values import JsonObject

_PLANE_SIZE = 0xFFFD
# Unicode's planes for private use; the second for texts that have characters of the first.
_PLANES = {
    base: re.compile(f"[{chr(base)}-{chr(base + _PLANE_SIZE)}]") for base in (0xF0000, 0x100000)
}
_THOUGHT_END = "</think>"

Wrap = Callable[[str, str], str]


@dataclass(frozen=True)
class Mark:
    """A mark in a rendering."""

    owner: int  # index of the message; the number of messages for the tools
    in_call: bool  # whether it is in a tool call
    place: int  # number of characters of the text before it


@dataclass(frozen=True)
class Marked:
    """A rendering and its marks."""

    text: str  # without the marks
    marks: list[Mark]  # in the order of the text

    def of(self, owner: int) -> list[Mark]:
        """Return the marks of a message."""
        return [mark for mark in self.marks if mark.owner == owner]

    def after(self, owner: int, count: int | None = None) -> tuple[int, str]:
        """Return the place of a message's last mark, and the text from there to the next mark.

        ``count``, from 1, takes an earlier mark if there are so many: some templates write the name
        of a called function once more with the answer to it.
        """
        own = [i for i, mark in enumerate(self.marks) if mark.owner == owner]
        index = own[-1] if count is None else own[min(count, len(own)) - 1]
        start = self.marks[index].place
        is_last = index + 1 == len(self.marks)
        return start, self.text[start : None if is_last else self.marks[index + 1].place]


class Marker:
    """Marks messages and tools, and reads the marks in a rendering.

    ``text`` is the real rendering, which must have none of the marks; ``wrap`` puts marks into a
    text, and is one of :data:`WRAPS`; ``answers_only`` marks only the assistant's messages.
    ``is_usable`` is whether there are enough characters that the text does not have,
    ``marks_starts`` whether there is a mark before each text.
    """

    def __init__(
        self, text: str, num_messages: int, wrap: Wrap, *, answers_only: bool = False
    ) -> None:
        self._num_messages = num_messages
        self._wrap = wrap
        self._answers_only = answers_only
        free = [base for base, pattern in _PLANES.items() if not pattern.search(text)]
        self.is_usable = bool(free) and 2 * num_messages < _PLANE_SIZE
        self.marks_starts = wrap in (_around, _start_only)
        self._base = free[0] if free else 0

    def mark(self, messages: Sequence[JsonObject]) -> list[Message]:
        """Return copies of the messages with marks in contents, thoughts and tool calls."""
        return [self._mark_message(i, message) for i, message in enumerate(messages)]

    def mark_tools(self, tools: Sequence[JsonObject] | None) -> Sequence[JsonObject] | None:
        """Return copies of the tools with marks in their names."""
        mark = self._character(self._num_messages)
        return tools and [self._mark_tool(tool, mark) for tool in tools]

    def num_in_calls(self, message: JsonObject, index: int) -> int:
        """Return the number of marks in the tool calls of a marked message."""
        if "tool_calls" not in message:
            return 0
        calls = json.dumps(message["tool_calls"], ensure_ascii=False)
        return calls.count(self._character(index, in_call=True))

    def num_in_content(self, message: JsonObject, index: int) -> int:
        """Return the number of marks in the content of a marked message."""
        return str(message.get("content", "")).count(self._character(index))

    def read(self, rendering: str) -> Marked:
        """Separate a rendering from its marks."""
        marks: list[Mark] = []
        for found in _PLANES[self._base].finditer(rendering):
            code = ord(found.group()) - self._base
            marks.append(Mark(code // 2, bool(code % 2), found.start() - len(marks)))
        return Marked(_PLANES[self._base].sub("", rendering), marks)

    def _character(self, owner: int, *, in_call: bool = False) -> str:
        return chr(self._base + 2 * owner + in_call)

    def _mark_message(self, index: int, message: JsonObject) -> Message:
        marked = dict(message)
        if self._answers_only and message["role"] != "assistant":
            return marked
        for key in ("content", "reasoning_content", "thinking"):
            if isinstance(marked.get(key), str):
                marked[key] = self._wrap(marked[key], self._character(index))
        if "tool_calls" in marked:
            mark = self._character(index, in_call=True)
            marked["tool_calls"] = [self._mark_call(call, mark) for call in marked["tool_calls"]]
        return marked

    def _mark_call(self, call: JsonObject, mark: str) -> JsonObject:
        function = call["function"]
        name = self._wrap(function["name"], mark)
        arguments = self._mark_value(function["arguments"], mark)
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _mark_value(self, value: object, mark: str) -> Any:
        if isinstance(value, str):
            return self._wrap(value, mark)
        if isinstance(value, Mapping):
            return {self._wrap(k, mark): self._mark_value(v, mark) for k, v in value.items()}
        if isinstance(value, list):
            return [self._mark_value(item, mark) for item in value]
        return value

    def _mark_tool(self, tool: JsonObject, mark: str) -> JsonObject:
        # OpenAI's form has the function in a dict of its own; some templates take its keys alone.
        if isinstance(tool.get("function"), Mapping):
            return {**tool, "function": self._mark_tool(tool["function"], mark)}
        if isinstance(tool.get("name"), str):
            return {**tool, "name": self._wrap(tool["name"], mark)}
        return dict(tool)


def _around(text: str, mark: str) -> str:
    return _inside_space(text, lambda body: mark + _answer_marked(body, mark) + mark)


def _answer_only(text: str, mark: str) -> str:
    """Templates ask whether a content begins with a thought; a mark before it hides that."""
    return _inside_space(text, lambda body: _answer_marked(body, mark) + mark)


def _end_only(text: str, mark: str) -> str:
    return _inside_space(text, lambda body: body + mark)


def _start_only(text: str, mark: str) -> str:
    return _inside_space(text, lambda body: mark + body)


# Tried in turn, until the rendering without marks is the real one.
WRAPS: tuple[Wrap, ...] = (_around, _answer_only, _end_only, _start_only)


def _inside_space(text: str, wrap: Callable[[str], str]) -> str:
    body = text.strip()
    if not body:
        return text
    start = text.index(body)
    return text[:start] + wrap(body) + text[start + len(body) :]


def _answer_marked(body: str, mark: str) -> str:
    """Mark the begin of the text after a thought: templates drop thoughts of earlier turns."""
    thought, end, answer = body.rpartition(_THOUGHT_END)
    bare = answer.lstrip()
    if not end or not bare:
        return body
    return thought + end + answer[: len(answer) - len(bare)] + mark + bare
