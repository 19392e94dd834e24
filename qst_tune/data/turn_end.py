"""What a chat template writes after an answer, found by rendering a conversation."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qst_tune.data.chat_template import ChatTemplate
from qst_tune.errors import UserError

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
    text = _try_render(template, messages)
    places = [text.rfind(word) for word in _WORDS]
    if min(places) < 0:
        text = _try_render(template, messages[:2])
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
    text = _try_render(template, [question, call], tools=[_TOOL])
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


def _try_render(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    try:
        return template.render(messages, tools=tools)
    except UserError:
        return ""
