"""The text that tells which inputs of a linear layer are large: the same for everyone."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from qst_tune.errors import UserError

# Written for this package: prose, dialogue, questions, instructions, tables, code, numbers.
_FILE = Path(__file__).with_name("calibration.txt")
_TOKENS, _ROW = 2048, 256


@cache
def calibration_text() -> str:
    """Read the text."""
    return _FILE.read_text(encoding="utf-8")


@cache
def text_id() -> str:
    """Identify the text: the first 8 digits of its SHA-256."""
    return hashlib.sha256(calibration_text().encode()).hexdigest()[:8]


def calibration_tokens(directory: Path, vocab_size: int, max_seq_len: int) -> torch.Tensor:
    """Tokenize the text as a model's directory does, ``[B, T]``: up to 8 rows of 256 tokens.

    The rows are full. UserError if the directory has no tokenizer, or one of another model.
    """
    tokens = _encode(directory, calibration_text())[:_TOKENS]
    width = min(_ROW, max_seq_len, len(tokens))
    rows = torch.tensor(tokens[: len(tokens) // width * width]).view(-1, width)
    if int(rows.max()) >= vocab_size:
        raise UserError(
            f"model.repair_rank: the tokenizer of {directory} has the token {int(rows.max())}, and "
            f"the model only {vocab_size}: it is of another model"
        )
    return rows


def _encode(directory: Path, text: str) -> list[int]:
    path = directory / "tokenizer.json"
    try:
        tokenizer: Any = Tokenizer.from_file(str(path)) if path.is_file() else _converted(directory)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except (KeyboardInterrupt, SystemExit):
        raise
    # Files absent or damaged, libraries not installed; a panic of tokenizers is no Exception.
    except BaseException as error:
        raise UserError(
            f"model.repair_rank runs a text through the model, and {directory} has no tokenizer "
            f"that can be read ({' '.join(str(error).split())[:200]}): add tokenizer.json"
        ) from error
    return tokens


def _converted(directory: Path) -> Any:
    """The fast form of what transformers reads without ``tokenizer.json``."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False
    )
    return loaded.backend_tokenizer
