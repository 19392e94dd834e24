"""Text and conversations through any torchtune model tokenizer."""

from typing import Any

from torchtune.data import Message, truncate, validate_messages

from qst_tune.data.conversation import Conversation
from qst_tune.errors import UserError

# torchtune's name for the answer of a tool.
_TORCHTUNE_ROLES = {"tool": "ipython"}


def tokenize_text(tokenizer: Any, text: str) -> list[int]:
    """Tokenize text without roles, from its begin token to its end token.

    A text that is longer than the tokenizer's ``max_seq_len`` loses its end.
    """
    tokens: list[int] = tokenizer.encode(text, add_bos=True, add_eos=True)
    limit = getattr(tokenizer, "max_seq_len", None)
    return tokens if limit is None else list(truncate(tokens, limit))


def tokenize_conversation(
    tokenizer: Any, conversation: Conversation
) -> tuple[list[int], list[bool]]:
    """Tokenize messages: token ids, and for each True where no loss is taken.

    Only our tokenizer takes tools. A conversation that the tokenizer or its template cannot express
    is a UserError.
    """
    if hasattr(tokenizer, "tokenize_conversation"):
        tokens, mask = tokenizer.tokenize_conversation(
            conversation.messages, tools=conversation.tools, learnt=conversation.learnt
        )
        return tokens, mask
    messages = [
        _torchtune_message(message, learnt, type(tokenizer).__name__)
        for message, learnt in zip(conversation.messages, conversation.learnt, strict=True)
    ]
    if conversation.tools:
        raise _no_tools(type(tokenizer).__name__)
    validate_messages(messages)
    tokens, mask = tokenizer.tokenize_messages(messages)
    return tokens, mask


def _torchtune_message(message: dict[str, Any], learnt: bool, tokenizer: str) -> Message:
    if "tool_calls" in message:
        raise _no_tools(tokenizer)
    role = _TORCHTUNE_ROLES.get(message["role"], message["role"])
    return Message(role=role, content=message["content"], masked=not learnt)


def _no_tools(tokenizer: str) -> UserError:
    return UserError(
        f"it has tools or tool calls, which {tokenizer} cannot express: use the tokenizer "
        "qst_tune.data.hf_chat_tokenizer with the model's own chat template"
    )
