"""Reads the JSON files of a Hugging Face directory."""

import json
from pathlib import Path
from typing import Any

from qst_tune.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a file.

    Args:
        path (Path): may be absent.

    Returns:
        dict[str, Any]: empty for an absent file.

    Raises:
        UserError: if it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}; download it anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} has a JSON {type(content).__name__}, not an object")
    return content
