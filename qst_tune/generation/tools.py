"""Tools that a model may call, for its chat template."""

import json
from pathlib import Path
from typing import Any

from qst_tune.data.chat.messages import read_tools
from qst_tune.errors import UserError


def read_tool_file(path: Path, tokenizer: Any) -> list[Any]:
    """Read a JSON file with a list of schemas in OpenAI's form, at least one.

    Another file, or a tokenizer that takes no tools, is a UserError.
    """
    if not hasattr(tokenizer, "tokenize_conversation"):
        raise UserError(
            f"tools={path}: {type(tokenizer).__name__} takes no tools; use the tokenizer "
            "qst_tune.data.hf_chat_tokenizer"
        )
    try:
        content = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"tools={path} cannot be read: {error}") from error
    tools = read_tools(content)
    if not tools:
        raise UserError(f"tools={path} has no tool; write a list of JSON schemas")
    return tools
