"""Which part of a rendered conversation each message to be learnt takes up.

A prompt is what the template writes with ``add_generation_prompt``; an answer is what follows it,
up to and with its end-of-turn token. Where the rendering of the messages so far is a prefix of the
whole, that is all. It is no prefix in templates that write a message differently once more follows
(Qwen 3 drops thoughts, Phi-3 ends the conversation with eos, Mistral moves the system prompt to
the last question); there, marks around each text show where the template put it.
"""

from collections.abc import Sequence
from functools import lru_cache

from torchtune import utils

from qst_tune.data.marked_spans import MarkedSpans, check_rendering
from qst_tune.data.prefix_spans import span_by_prefix
from qst_tune.data.rendered_chat import RenderedChat, Span

log = utils.get_logger("INFO")


def find_learnt_spans(chat: RenderedChat, learnt: Sequence[bool]) -> list[Span]:
    """Find the messages that take loss.

    Args:
        chat (RenderedChat): the conversation.
        learnt (Sequence[bool]): for each message.

    Returns:
        list[Span]: character ranges of the rendering, in the order of the messages.

    Raises:
        UserError: naming a message, tool call or the tools that the rendering lacks.
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
        span = span_by_prefix(chat, indices[0]) if indices else None
        if span is not None or not indices:
            return [span] if span else []
    marked = MarkedSpans.of(chat)
    if marked is None:
        return [_by_prefix(chat, index) for index in indices]
    for name in check_rendering(marked, chat, indices):
        _warn_once(f"the chat template leaves out the content of {name} of a conversation")
    return [marked.span(index) for index in reversed(indices)][::-1]


def _is_plain(chat: RenderedChat) -> bool:
    """Whether all contents are in the rendering as they are, and there are no tools."""
    return not chat.tools and all(
        "tool_calls" not in message and message["content"].strip() in chat.text
        for message in chat.messages
    )


def _by_prefix(chat: RenderedChat, index: int) -> Span:
    span = span_by_prefix(chat, index)
    if span is None:
        raise chat.lost(index, "the template changes its text, or the text before it")
    return span


@lru_cache(maxsize=64)
def _warn_once(text: str) -> None:
    log.warning(text)
