"""Renders a conversation with the chat template that a Hugging Face model brings along.

transformers does this too, but importing it for one jinja template takes a second (version 5.23);
the tests compare this file with it.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torchtune.data import Message

# Hugging Face templates know the return of a tool call under another name than torchtune.
_HF_ROLES = {"ipython": "tool"}


class ChatTemplate:
    """A jinja chat template with the special tokens it may refer to.

    Args:
        source (str): the template.
        special_tokens (Mapping[str, str]): what the template sees by name, such as ``bos_token``.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Return the conversation as the text that the model was trained on.

        Args:
            messages (Sequence[Message]): the conversation, text only.
            add_generation_prompt (bool): end with the header of an assistant message.

        Returns:
            str: the rendered text, special tokens spelled out.

        Raises:
            ValueError: if a message has an image, or the template refuses the conversation.
        """
        try:
            return _compile(self.source).render(
                messages=[_to_dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error


class _GenerationTag(Extension):
    """Accepts ``{% generation %}``, which only marks text and does not change it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain class attribute

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


# Compiled templates cannot be pickled, so they are kept here and not in ChatTemplate, which
# travels to data loader workers.
@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    """Compile in the environment that Hugging Face templates are written for."""
    # Sandboxed, since the template is code that came with a downloaded model.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(date_format: str) -> str:
    return datetime.now().strftime(date_format)


def _to_dict(message: Message) -> dict[str, str]:
    if message.contains_media:
        raise ValueError(
            f"a {message.role} message contains an image; this tokenizer is for text, use the "
            "model's own torchtune transform"
        )
    return {"role": _HF_ROLES.get(message.role, message.role), "content": message.text_content}
