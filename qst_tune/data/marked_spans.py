"""Finds messages in a rendering by marks around their texts."""

import re
from itertools import product

from qst_tune.data.marked_messages import WRAPS, Marked, Marker
from qst_tune.data.rendered_chat import RenderedChat, Span
from qst_tune.errors import UserError


class MarkedSpans:
    """A rendering in which the place of every text is known.

    Args:
        marked_chat (RenderedChat): with marks in its messages and in its text.
        chat (RenderedChat): without marks.
        marker (Marker): made the marks.
    """

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
            marked = chat.rerender(marker.mark(chat.messages), marker.mark_tools(chat.tools))
            if marked is not None and marker.read(marked.text).text == chat.text:
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
        if prompt is None or not self._is_in_whole(prompt):
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
        marks = self._whole.of(index)
        if not any(mark.in_call for mark in marks):
            closed = self._end_by_closing(index, start)
            if closed is not None:
                return closed
        if index + 1 == len(self._chat.messages):
            return len(self._chat.text.removesuffix(self._chat.turn_end.tail))
        alone = self._read(self._marked_chat.up_to(index + 1))
        if alone is None or not self._is_in_whole(alone):
            place, after = self._after(index, start)
            return place + self._first_end(after, "")
        place, after, end = self._behind_last_mark(alone)
        if after.startswith(end):
            return place + len(end)
        return place + self._first_end(after, end)

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

    def _is_in_whole(self, prefix: Marked) -> bool:
        """Whether the whole also has the last mark of the first messages' rendering."""
        return not prefix.marks or bool(self._whole.of(prefix.marks[-1].owner))

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
        return None if rendering is None else self._marker.read(rendering)


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
