"""The chat template with which a side network was tuned, where it is not its backbone's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torchtune import utils

from qst_tune.data import hf_chat_tokenizer
from qst_tune.data.chat.template_source import template_names

_COMPONENTS = ("qst_tune.data.hf_chat_tokenizer", "qst_tune.data.chat_tokenizer.hf_chat_tokenizer")

log = utils.get_logger("INFO")


@dataclass(frozen=True)
class TunedTemplate:
    """The run's own template, Jinja (None: the backbone's), and the tokens that end an answer."""

    source: str | None
    stop_tokens: list[int]


def tuned_template(directory: Path, backbone: Path) -> TunedTemplate | None:
    """Read the template from ``recipe_config.yaml``; None for a tokenizer of torchtune, or none.

    The directory may be anyone's: a template is Jinja and runs in a sandbox, and a file that the
    config names is not read. ``backbone`` has the tokenizer's files. UserError if the template does
    not render messages.
    """
    block = _tokenizer_block(directory / "recipe_config.yaml")
    if block.get("_component_") not in _COMPONENTS or not any(backbone.glob("tokenizer*")):
        return None
    given = _portable(block.get("chat_template"), directory)
    tokenizer = hf_chat_tokenizer(str(backbone), chat_template=given)
    template = tokenizer.chat_template
    return TunedTemplate(
        source=template.source if given and template else None, stop_tokens=tokenizer.stop_tokens
    )


def _portable(template: Any, directory: Path) -> str | None:
    if not isinstance(template, str) or not template.strip():
        return None
    if template.strip() in template_names() or "{{" in template or "{%" in template:
        return template
    log.warning(f"{directory}: its chat template {template!r} is a file; the backbone's is used")
    return None


def _tokenizer_block(path: Path) -> dict[str, Any]:
    try:
        block = yaml.safe_load(path.read_text(encoding="utf-8"))["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}
    return block if isinstance(block, dict) else {}
