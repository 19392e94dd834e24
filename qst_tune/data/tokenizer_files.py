"""Loads the fast tokenizer of a Hugging Face directory."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qst_tune.data.special_tokens import read_special_tokens
from qst_tune.errors import UserError
from qst_tune.json_files import read_json

# Classes that take tokenizer.json as it is. transformers 5 rebuilds the others, with rules of
# their own for white space, and it reads files without tokenizer.json (OPT, sentencepiece).
_PLAIN_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")

_SMALLEST_VOCABULARY = 32


def read_tokenizer(directory: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Load a tokenizer equal to transformers' ``AutoTokenizer``, and its special tokens by name.

    A class that takes tokenizer.json as it is loads without transformers, whose import takes 1.4 s
    and whose loading one second more (5.23, two cores). A directory without a tokenizer, or with
    one that needs code of its own, is a UserError.
    """
    has_file = (directory / "tokenizer.json").is_file()
    config = read_json(directory / "tokenizer_config.json", optional=True)
    tokenizer_class = config.get("tokenizer_class")
    if has_file and (tokenizer_class in _PLAIN_CLASSES or "auto_map" in config):
        tokenizer = _from_file(directory / "tokenizer.json")
        special_tokens = read_special_tokens(directory, tokenizer)
    else:
        tokenizer, special_tokens = _from_transformers(directory)
    # The file may carry the settings of whoever saved it; they would cut or pad every text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, special_tokens


def _from_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower class
        raise UserError(f"tokenizer: {path} cannot be read: {error}; download it again") from error


def _from_transformers(directory: Path) -> tuple[Tokenizer, dict[str, str]]:
    # Imported here: it takes seconds, and few need it.
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds: files absent or damaged, libraries not installed
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"tokenizer: {directory} has no tokenizer.json that can be used as it is, and "
            f"transformers cannot load its tokenizer ({reason}); add tokenizer.json, or use a "
            "torchtune tokenizer"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            f"tokenizer: {directory} has a {type(loaded).__name__} without a fast form; save one "
            "with transformers (tokenizer.json), or use a torchtune tokenizer"
        )
    # Without any vocabulary file transformers makes a tokenizer of a few special tokens (5.23).
    if backend.get_vocab_size(with_added_tokens=False) < _SMALLEST_VOCABULARY:
        raise UserError(
            f"tokenizer: {directory} has no tokenizer.json and no other vocabulary: download it"
        )
    special = {name: token for name, token in loaded.special_tokens_map.items()}
    return backend, {name: token for name, token in special.items() if isinstance(token, str)}
