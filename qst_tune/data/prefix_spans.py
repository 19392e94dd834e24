"""Finds a message in a rendering by the rendering of the messages before it."""

from qst_tune.data.rendered_chat import RenderedChat, Span


def span_by_prefix(chat: RenderedChat, index: int) -> Span | None:
    """Find what a message adds to the rendering of those before it.

    Args:
        chat (RenderedChat): the conversation.
        index (int): of the message.

    Returns:
        Span | None: a character range; None if the template writes the first messages differently
            on their own than in the whole, or the content of the message is not in the range.
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
