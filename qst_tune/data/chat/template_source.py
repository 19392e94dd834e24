"""Which chat template a tokenizer has: by name, from a file, as text, or the directory's own."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchtune import utils

from qst_tune.data.chat.template import ChatTemplate, find_turn_end
from qst_tune.data.values import kind_of
from qst_tune.errors import UserError, did_you_mean

log = utils.get_logger("INFO")

_NAMED = Path(__file__).parent / "chat_templates"


def template_names() -> list[str]:
    """Return the names that ``tokenizer.chat_template`` may have."""
    return sorted(path.stem for path in _NAMED.glob("*.jinja"))


def given_template(
    value: str, special_tokens: Mapping[str, str], special: re.Pattern[str]
) -> ChatTemplate:
    """Build the template that a config names: a name, the path of a file, or a Jinja template.

    ``special`` finds special tokens in text. UserError if it is none of the three, or does not
    render a short conversation.
    """
    name = value.strip()
    if name in template_names():
        return _named_template(name, special_tokens, special)
    if "{{" in value or "{%" in value:
        template, what = ChatTemplate(value, special_tokens), "tokenizer.chat_template"
    else:
        path = Path(name).expanduser()
        template, what = ChatTemplate(_read_file(path, name), special_tokens), str(path)
    _check(template, what)
    return template


def directory_template(
    found: Any, special_tokens: Mapping[str, str], directory: Path
) -> ChatTemplate | None:
    """Build a directory's own template, and that for tools if it has several, by their names.

    None for a base model. Several templates of which none is called default are a UserError.
    """
    if not found:
        return None
    templates = {"default": found} if isinstance(found, str) else found
    texts = [*templates, *templates.values()] if isinstance(templates, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{directory}: chat_template is {kind_of(found)}: it must be text")
    if "default" not in templates:
        raise UserError(
            f"{directory} has the chat templates {', '.join(sorted(templates))} and none called "
            "default; name a file with tokenizer.chat_template"
        )
    tool_source = templates.get("tool_use")
    return ChatTemplate(templates["default"], special_tokens, tool_source=tool_source)


def no_template() -> UserError:
    """Return the error for messages without a chat template."""
    return UserError(
        "the tokenizer has no chat template, which messages need; set tokenizer.chat_template="
        f"chatml (or one of {', '.join(template_names())}), or the path of a .jinja file"
    )


def _named_template(
    name: str, special_tokens: Mapping[str, str], special: re.Pattern[str]
) -> ChatTemplate:
    source = (_NAMED / f"{name}.jinja").read_text("utf-8")
    template = ChatTemplate(source, special_tokens)
    closing = find_turn_end(template, special).closing
    if special.search(closing):
        return template
    log.warning(
        f"{closing!r}, with which chat_template={name} ends a turn, is no special token of this "
        "tokenizer: it is spelt in several tokens, and eos_token follows each answer, for "
        "generation to stop at"
    )
    return ChatTemplate("{% set turn_eos = eos_token %}" + source, special_tokens)


def _read_file(path: Path, value: str) -> str:
    if not path.is_file():
        raise UserError(
            f"tokenizer.chat_template={value} is no file, no Jinja template and no name; the names "
            f"are {', '.join(template_names())}{did_you_mean(value, template_names())}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer.chat_template={value} cannot be read: {error}") from error


def _check(template: ChatTemplate, what: str) -> None:
    words = {"user": "Somequestion", "assistant": "Someanswer"}
    try:
        text = template.render([{"role": r, "content": word} for r, word in words.items()])
    except UserError as error:
        raise UserError(f"{what} is no chat template: {error}") from error
    missing = [role for role, word in words.items() if word not in text]
    if missing:
        raise UserError(
            f"{what} is no chat template: it does not render the content of {missing[0]} messages; "
            "write {{ message['content'] }} in a loop over messages"
        )
