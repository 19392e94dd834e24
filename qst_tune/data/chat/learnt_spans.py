"""Which part of a rendered conversation each learnt message takes up.

A prompt is what the template writes with ``add_generation_prompt``; an answer is what follows it,
including its end-of-turn token. Usually the rendering of the messages so far is a prefix of the
whole, and gives both. It is no prefix in templates that write a message differently once more
follow (Qwen 3 drops thoughts, Phi-3 ends the conversation with eos, Mistral moves the system prompt
to the last question). There, marks around each text show where the template put it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from torchtune import utils

from qst_tune.data.chat.marks import WRAPS, Marked, Marker
from qst_tune.data.chat.template import ChatTemplate, Messages, Tools, TurnEnd
from qst_tune.errors import UserError

Span = tuple[int, int]

log = utils.get_logger("INFO")


@dataclass(frozen=True)
class RenderedChat:
    """A conversation and its rendering."""

    template: ChatTemplate
    messages: Messages  # from check_messages
    tools: Tools | None  # JSON schemas of the tools that the model may call
    text: str  # the rendering
    turn_end: TurnEnd  # how the template ends an answer

    def prompt(self, index: int) -> str | None:
        """Render what comes before a message; None if the template refuses that.

        Before an assistant's message the text ends with the generation prompt, as at inference.
        Before another first message it is empty.
        """
        if self.messages[index]["role"] == "assistant":
            before = self.messages[:index]
            return self.template.try_render(before, tools=self.tools, add_generation_prompt=True)
        return self.up_to(index) if index else ""

    def up_to(self, count: int) -> str | None:
        """Render the first messages, without the end of a conversation; None if refused."""
        text = self.template.try_render(self.messages[:count], tools=self.tools)
        return text and text.removesuffix(self.turn_end.tail)

    @property
    def end(self) -> int:
        """Where the last message ends."""
        return len(self.text.removesuffix(self.turn_end.tail))

    def without_space(self, start: int, end: int) -> Span:
        """Drop the white space that follows a message's end token: generation stops before it."""
        ends = [match.end() for match in self.turn_end.special.finditer(self.text, start, end)]
        return start, ends[-1] if ends and not self.text[ends[-1] : end].strip() else end

    def ends_with_special(self, start: int, end: int) -> bool:
        """Whether the last characters of a range are a special token."""
        # No special token is longer, and an answer may be long.
        found = self.turn_end.special.finditer(self.text, max(start, end - 64), end)
        return any(match.end() == end for match in found)

    def name(self, index: int) -> str:
        """Return the name of a message for errors."""
        return f"message {index} ({self.messages[index]['role']})"

    def lost(self, index: int, why: str) -> UserError:
        """Return the error for a message that is not found in the rendering."""
        return UserError(
            f"{self.name(index)} cannot be found in the rendering of the chat template: {why}; "
            "take no loss on it, or use another template (tokenizer.chat_template)"
        )


def find_learnt_spans(chat: RenderedChat, learnt: Sequence[bool]) -> list[Span]:
    """Return the character range in the rendering of each learnt message, in order.

    A message, tool call or tools that the rendering lacks are a UserError that names them.
    """
    spans = _find(chat, [index for index, is_learnt in enumerate(learnt) if is_learnt])
    if spans and not chat.ends_with_special(*spans[-1]):
        _warn_once(
            "the chat template ends answers without a special token, so the model does not learn "
            "to stop and generation ends at max_new_tokens; another template "
            "(tokenizer.chat_template) may suit this tokenizer"
        )
    return spans


def _find(chat: RenderedChat, indices: list[int]) -> list[Span]:
    if len(indices) <= 1 and _is_plain(chat):
        span = _span_by_prefix(chat, indices[0]) if indices else None
        if span is not None or not indices:
            return [span] if span else []
    marked = MarkedSpans.of(chat)
    if marked is None:
        return [_by_prefix(chat, index) for index in indices]
    for name in check_rendering(marked, chat, indices):
        _warn_once(f"the chat template leaves out the content of {name} of a conversation")
    return [marked.span(index) for index in reversed(indices)][::-1]


def _is_plain(chat: RenderedChat) -> bool:
    """Whether all contents are unchanged in the rendering, and there are no tools."""
    return not chat.tools and all(
        "tool_calls" not in message and message["content"].strip() in chat.text
        for message in chat.messages
    )


def _by_prefix(chat: RenderedChat, index: int) -> Span:
    span = _span_by_prefix(chat, index)
    if span is None:
        raise chat.lost(index, "the template changes its text, or the text before it")
    return span


def _span_by_prefix(chat: RenderedChat, index: int) -> Span | None:
    """Return the characters that a message adds to the rendering of those before it.

    None if the template writes the first messages differently on their own than in the whole, or
    the content of the message is not in the range.
    """
    start = _length(chat, chat.prompt(index))
    is_last = index + 1 == len(chat.messages)
    end = chat.end if is_last else _length(chat, chat.up_to(index + 1))
    if start is None or end is None:
        return None
    content = chat.messages[index].get("content", "").strip()
    return chat.without_space(start, end) if content in chat.text[start:end] else None


def _length(chat: RenderedChat, prefix: str | None) -> int | None:
    return None if prefix is None or not chat.text.startswith(prefix) else len(prefix)


@lru_cache(maxsize=64)
def _warn_once(text: str) -> None:
    log.warning(text)


class MarkedSpans:
    """A rendering in which the place of every text is known: a chat with marks and without."""

    def __init__(self, marked_chat: RenderedChat, chat: RenderedChat, marker: Marker) -> None:
        self._marked_chat = marked_chat
        self._chat = chat
        self._marker = marker
        self._whole = marker.read(marked_chat.text)
        self._prompt_ends: list[str] = []

    @classmethod
    def of(cls, chat: RenderedChat) -> "MarkedSpans | None":
        """Mark a conversation; None if its template does not keep the marks apart from the text."""
        # Some templates ask what a question begins and ends with (Qwen 3: <tool_response>).
        for answers_only, wrap in product((False, True), WRAPS):
            marker = Marker(chat.text, len(chat.messages), wrap, answers_only=answers_only)
            if not marker.is_usable:
                return None
            messages, tools = marker.mark(chat.messages), marker.mark_tools(chat.tools)
            text = chat.template.try_render(messages, tools=tools)
            if text is not None and marker.read(text).text == chat.text:
                marked = replace(chat, messages=messages, tools=tools, text=text)
                return cls(marked, chat, marker)
        return None

    def dropped(self, index: int) -> str | None:
        """Return what the rendering lacks of a message: ``content``, ``tool_calls`` or None."""
        message, marks = self._marked_chat.messages[index], self._whole.of(index)
        in_calls = sum(mark.in_call for mark in marks)
        if in_calls < self._marker.num_in_calls(message, index):
            return "tool_calls"
        is_marked = self._marker.num_in_content(message, index) > 0
        return "content" if is_marked and in_calls == len(marks) else None

    @property
    def drops_tools(self) -> bool:
        """Whether the rendering lacks the names of the tools."""
        return bool(self._chat.tools) and not self._whole.of(len(self._chat.messages))

    def span(self, index: int) -> Span:
        """Find the character range of a message; one that cannot be found is a UserError.

        Ask for the last one first: its prompt is the model's at inference, and those of earlier
        answers mostly end alike and need no rendering.
        """
        start = self._start(index)
        end = self._end(index, start)
        if end < start:
            raise self._chat.lost(index, "it would end before it begins")
        return self._chat.without_space(start, end)

    def _start(self, index: int) -> int:
        known = self._start_by_known_end(index)
        if known is not None:
            return known
        marks = self._whole.of(index)
        prompt = self._read(self._marked_chat.prompt(index))
        if prompt is None:
            if not marks:
                raise self._chat.lost(index, "the template writes nothing of it")
            return marks[0].place
        place, after, end = self._behind_last_mark(prompt)
        if after.startswith(end):
            if prompt.marks and prompt.marks[-1].owner == index - 1:
                self._prompt_ends.append(end)
            return place + len(end)
        # The prompt opens a thought that the template leaves out of this answer.
        if self._has_first_mark(index):
            return marks[0].place
        return place + _common_lines(after, end, self._chat.turn_end.special)

    def _has_first_mark(self, index: int) -> bool:
        """Whether a message has a mark at its begin, and none of the content's is dropped."""
        placed = self._marker.num_in_content(self._marked_chat.messages[index], index)
        found = sum(not mark.in_call for mark in self._whole.of(index))
        return self._marker.marks_starts and 0 < placed <= found

    def _start_by_known_end(self, index: int) -> int | None:
        """Begin of an answer to a message that is followed by a known end of a prompt."""
        if self._chat.messages[index]["role"] != "assistant" or not self._whole.of(index - 1):
            return None
        place, after = self._whole.after(index - 1)
        known = [len(end) for end in self._prompt_ends if after.startswith(end)]
        return place + max(known) if known else None

    def _end(self, index: int, start: int) -> int:
        if not any(mark.in_call for mark in self._whole.of(index)):
            closed = self._end_by_closing(index, start)
            if closed is not None:
                return closed
        if index + 1 == len(self._chat.messages):
            return self._chat.end
        alone = self._read(self._marked_chat.up_to(index + 1))
        if alone is None:
            place, after = self._after(index, start)
            return place + self._first_end(after, "")
        place, after, end = self._behind_last_mark(alone)
        return place + (len(end) if after.startswith(end) else self._first_end(after, end))

    def _end_by_closing(self, index: int, start: int) -> int | None:
        """End of a content that the template closes as it closes all answers."""
        place, after = self._after(index, start)
        closing = self._chat.turn_end.closing.strip()
        begin = after.find(closing) if closing else -1
        is_next = not after[:begin].strip() or not self._whole.of(index)
        return place + begin + len(closing) if begin >= 0 and is_next else None

    def _after(self, index: int, start: int) -> tuple[int, str]:
        """Return the place after the message's last text, and the text from there to another's."""
        if self._whole.of(index):
            return self._whole.after(index)
        later = (m.place for m in self._whole.marks if m.owner > index and m.place >= start)
        return start, self._chat.text[start : min(later, default=len(self._chat.text))]

    def _first_end(self, after: str, alone: str) -> int:
        """Return the end of a message whose end differs at the end of a conversation."""
        common = _num_common(after, alone)
        ends = [match.end() for match in self._chat.turn_end.special.finditer(after)]
        return next((end for end in ends if end > common), common)

    def _behind_last_mark(self, prefix: Marked) -> tuple[int, str, str]:
        """Return the place of the prefix's last mark in the whole, and the text after both.

        Without a mark, where all contents so far are empty, that is the begin of the text.
        """
        if not prefix.marks:
            first = [mark.place for mark in self._whole.marks[:1]]
            return 0, self._chat.text[: first[0] if first else None], prefix.text
        mark = prefix.marks[-1]
        place, after = self._whole.after(mark.owner, len(prefix.of(mark.owner)))
        return place, after, prefix.text[mark.place :]

    def _read(self, rendering: str | None) -> Marked | None:
        """Read the first messages' rendering, if the whole also has its last mark."""
        marked = None if rendering is None else self._marker.read(rendering)
        is_in_whole = marked and (not marked.marks or self._whole.of(marked.marks[-1].owner))
        return marked if is_in_whole else None


def check_rendering(spans: MarkedSpans, chat: RenderedChat, learnt: list[int]) -> list[str]:
    """Return the names of messages whose content is not rendered.

    A learnt content, tool call or tools that are not rendered are a UserError.
    """
    other = "use a template that does (tokenizer.chat_template), or leave them out of the rows"
    if spans.drops_tools:
        raise UserError(f"the chat template does not render the tools; {other}")
    dropped = {index: spans.dropped(index) for index in range(len(chat.messages))}
    for index, what in dropped.items():
        if what == "tool_calls":
            name = chat.name(index)
            raise UserError(f"the chat template does not render all tool_calls of {name}; {other}")
        if what and index in learnt:
            raise chat.lost(index, "the template does not render its content")
    return [chat.name(index) for index, what in dropped.items() if what]


def _num_common(one: str, other: str) -> int:
    """Return the number of characters that both texts begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _common_lines(one: str, other: str, special: re.Pattern[str]) -> int:
    """Return the length of the common begin, cut after a line break or special token."""
    common = one[: _num_common(one, other)]
    if common == one:
        return len(one)
    ends = [match.end() for match in special.finditer(common)]
    return max(common.rfind("\n") + 1, *ends, 0)
