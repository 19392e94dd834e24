"""Reads the JSON files of a Hugging Face directory."""

import json
from pathlib import Path
from typing import Any

from qst_tune.errors import UserError

# Hundreds of times the largest index of shards. A tokenizer.json is not read here.
MAX_BYTES = 2**26


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Read a JSON object; anything else is a UserError, except an ``optional`` file's absence."""
    if optional and not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        content = json.loads(text.decode("utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; copy or download it again"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path} is not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        reason = f"more than {MAX_BYTES >> 20} MiB" if len(text) > MAX_BYTES else str(error)
        raise UserError(f"{path} is not valid JSON: {reason}; copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not valid JSON: it has a {type(content).__name__}, no object")
    return content
