"""A chat template: how it renders a conversation, and what it writes after an answer."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2

# The sandbox that Hugging Face's templates are written for: they are code of a downloaded model.
from transformers.utils.chat_template_utils import _compile_jinja_template

from qst_tune.data.chat.messages import call_variants
from qst_tune.errors import UserError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

# Raised by a template itself, and by Python for None + "text" inside it.
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)

# A conversation that shows how a template ends answers and calls.
_WORDS = ("Firstquestion", "Firstanswer", "Secondquestion", "Secondanswer")
_CALL = {
    "id": "call12345",  # Mistral's templates want nine characters
    "type": "function",
    "function": {"name": "firstcall", "arguments": {"place": "somewhere"}},
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "firstcall",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}


class ChatTemplate:
    """A jinja template with the special tokens that it may use by name, such as ``bos_token``.

    ``tool_source`` is the template for conversations with tools, if it is another. ``strftime_now``
    writes ``date``, the day this object was made, so that all epochs have the same tokens; a
    resumed run sets it to its first day.
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
        """Render messages of ``check_messages``, special tokens spelled out, as transformers does.

        ``tools`` are JSON schemas of what the model may call; ``add_generation_prompt`` ends the
        text with the header of an assistant message. UserError if the template refuses the
        conversation.
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
                return str(_compile_jinja_template(source).render(messages=variant, **settings))
            except _REFUSALS as error:
                refusal = refusal or error
        raise UserError(f"the chat template refuses this conversation: {refusal}") from refusal

    def try_render(self, messages: Messages, **settings: Any) -> str | None:
        """Render messages as :meth:`render` does; None if the template refuses them."""
        try:
            return self.render(messages, **settings)
        except UserError:
            return None


@dataclass(frozen=True)
class TurnEnd:
    """The end of an answer."""

    special: re.Pattern[str]  # finds special tokens in text
    closing: str = ""  # written after every answer, up to its end-of-turn token
    # written after that and white space, only at the end of a conversation (Phi-3: eos)
    tail: str = ""


def special_pattern(tokens: Collection[str]) -> re.Pattern[str]:
    """Return a pattern that finds special tokens in text, the longest one first."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


def find_turn_end(template: ChatTemplate, special: re.Pattern[str]) -> TurnEnd:
    """Find how a template ends an answer; empty if it refuses a plain conversation."""
    roles = ("user", "assistant") * 2
    messages = [{"role": r, "content": w} for r, w in zip(roles, _WORDS, strict=True)]
    text = template.try_render(messages) or ""
    places = [text.rfind(word) for word in _WORDS]
    if min(places) < 0:
        text = template.try_render(messages[:2]) or ""
        last = middle = text.rpartition(_WORDS[1])[2] if _WORDS[1] in text else ""
    else:
        middle = text[places[1] + len(_WORDS[1]) : places[2]]
        last = text[places[3] + len(_WORDS[3]) :]
    closing = _closing(last, middle, special)
    return TurnEnd(special, closing, last[len(closing) :].lstrip())


def find_stop_strings(template: ChatTemplate, turn_end: TurnEnd) -> list[str]:
    """Find the special tokens with which a template ends an answer, and one with a tool call."""
    found = turn_end.special.findall(turn_end.closing)[:1]
    question = {"role": "user", "content": _WORDS[0]}
    call = {"role": "assistant", "tool_calls": [_CALL]}
    text = template.try_render([question, call], tools=[_TOOL]) or ""
    if "somewhere" in text:
        text = text.removesuffix(turn_end.tail).rstrip()
        found += [end for end in turn_end.special.findall(text)[-1:] if text.endswith(end)]
    return list(dict.fromkeys(found))


def _closing(last: str, middle: str, special: re.Pattern[str]) -> str:
    ends = [match.end() for match in special.finditer(last)]
    shared = [end for end in ends if middle.startswith(last[:end])]
    if ends:
        return last[: shared[-1] if shared else ends[0]]
    plain = last.rstrip()
    return plain if middle.startswith(plain) else ""
