"""Which part of a rendered conversation each learnt message takes up.

A prompt is what the template writes with ``add_generation_prompt``; an answer is what follows it,
including its end-of-turn token. Usually the rendering of the messages so far is a prefix of the
whole, and gives both. It is no prefix in templates that write a message differently once more
follow (Qwen 3 drops thoughts, Phi-3 ends the conversation with eos, Mistral moves the system prompt
to the last question). There, marks around each text show where the template put it.
"""

from collections.abc import Sequence
from functools import lru_cache

from torchtune import utils

from qst_tune.data.marked_spans import MarkedSpans, check_rendering
from qst_tune.data.rendered_chat import RenderedChat, Span

log = utils.get_logger("INFO")


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
    if index + 1 == len(chat.messages):
        end: int | None = len(chat.text.removesuffix(chat.turn_end.tail))
    else:
        end = _length(chat, chat.up_to(index + 1))
    if start is None or end is None:
        return None
    content = chat.messages[index].get("content", "").strip()
    return chat.without_space(start, end) if content in chat.text[start:end] else None


def _length(chat: RenderedChat, prefix: str | None) -> int | None:
    return None if prefix is None or not chat.text.startswith(prefix) else len(prefix)


@lru_cache(maxsize=64)
def _warn_once(text: str) -> None:
    log.warning(text)
