"""Reads the JSON files of a Hugging Face directory."""

import json
from pathlib import Path
from typing import Any

from qst_tune.errors import UserError


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Read a JSON object; anything else is a UserError, except an ``optional`` file's absence."""
    if optional and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; copy or download it again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}; copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not valid JSON: it has a {type(content).__name__}, no object")
    return content
