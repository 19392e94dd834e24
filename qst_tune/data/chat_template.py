"""Renders a conversation with the chat template of a Hugging Face model.

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

from qst_tune.data.chat_messages import call_variants
from qst_tune.errors import UserError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

# Raised by a template itself, and by Python for None + "text" inside it.
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)


class ChatTemplate:
    """A jinja chat template with the special tokens that it may use.

    Args:
        source (str): the template.
        special_tokens (Mapping[str, str]): visible to the template by name, such as ``bos_token``.
        tool_source (str | None): the template for conversations with tools; None: ``source``.

    Attributes:
        date (datetime): written by ``strftime_now``. It is the day this object was made, so
            that all epochs have the same tokens; a resumed run sets it to its first day.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, tool_source: str | None = None
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.tool_source = tool_source
        self.date = datetime.now()

    @property
    def writes_date(self) -> bool:
        """Whether the template may write today's date."""
        return "strftime_now" in self.source + (self.tool_source or "")

    def render(
        self, messages: Messages, *, tools: Tools | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Render checked messages as the text that the model was trained on.

        Args:
            messages (Messages): from :func:`~qst_tune.data.chat_messages.check_messages`.
            tools (Tools | None): JSON schemas of the tools that the model may call.
            add_generation_prompt (bool): end with the header of an assistant message.

        Returns:
            str: the text with special tokens spelled out.

        Raises:
            UserError: if the template refuses the conversation.
        """
        source = self.tool_source if tools and self.tool_source else self.source
        settings = {
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": self.date.strftime,
            **self.special_tokens,
        }
        refusal: Exception | None = None
        for variant in call_variants(messages):
            try:
                return _compile(source).render(messages=variant, **settings)
            except _REFUSALS as error:
                refusal = refusal or error
        raise UserError(f"the chat template refuses this conversation: {refusal}") from refusal


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
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
