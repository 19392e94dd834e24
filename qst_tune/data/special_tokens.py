"""The special tokens of a Hugging Face directory, from all files that name some.

As in transformers 5: if tokenizer_config.json has ``added_tokens_decoder``, it is complete. Older
directories have special_tokens_map.json, whose values win, and added_tokens.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from torchtune import utils

from qst_tune.json_files import read_json

NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

log = utils.get_logger("INFO")


def read_special_tokens(directory: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Add the tokens that tokenizer.json lacks, in place, and return those that have a name."""
    config = read_json(directory / "tokenizer_config.json", optional=True)
    decoder = config.get("added_tokens_decoder")
    given: dict[str, Any] = {}
    if decoder is None:
        given = read_json(directory / "special_tokens_map.json", optional=True)
        _report_conflicts(config, given)
    named = {name: token for name, token in {**config, **given}.items() if _is_named(name, token)}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, Mapping):
        named.update(extra)
        extra = []
    extra = [*extra, *(given.get("extra_special_tokens") or [])]
    if decoder is None:
        decoder = _older_decoder(directory, [*named.values(), *extra])
    _add_tokens(tokenizer, decoder, [*named.values(), *extra])
    return {name: _content(token) for name, token in named.items()}


def _is_named(name: str, token: Any) -> bool:
    if name in NAMES:
        return token is not None
    # Of some models alone, such as image_token; add_bos_token is a flag.
    return name.endswith("_token") and isinstance(token, str)


def _content(token: Any) -> str:
    """A token is a string, or a dict with its content and stripping rules."""
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


def _report_conflicts(config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name in NAMES:
        before, now = config.get(name), given.get(name)
        if before is not None and now is not None and _content(before) != _content(now):
            log.warning(
                f"{name} is {_content(before)!r} in tokenizer_config.json and {_content(now)!r} in "
                "special_tokens_map.json; the latter is used, as in transformers"
            )


def _older_decoder(directory: Path, special: list[Any]) -> dict[str, Any]:
    """Bring added_tokens.json into the form of ``added_tokens_decoder``."""
    contents = {_content(token) for token in special}
    return {
        str(index): {"content": token, "special": token in contents, "normalized": False}
        for token, index in read_json(directory / "added_tokens.json", optional=True).items()
    }


def _add_tokens(tokenizer: Tokenizer, decoder: Mapping[str, Any], special: list[Any]) -> None:
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for index, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        if _content(token) not in present:
            tokenizer.add_tokens([_added_token(token)])
        _report_other_id(tokenizer, _content(token), int(index))
    before = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([_added_token(token, special=True) for token in special])
    if tokenizer.get_vocab_size() > before:
        new = [str(tokenizer.id_to_token(i)) for i in range(before, tokenizer.get_vocab_size())]
        log.info(f"special tokens that no file gives an id follow the vocabulary: {', '.join(new)}")


def _added_token(token: Any, **flags: bool) -> AddedToken:
    if isinstance(token, Mapping):
        flags = {**{name: bool(token[name]) for name in _FLAGS if name in token}, **flags}
    return AddedToken(_content(token), **{"normalized": False, **flags})


def _report_other_id(tokenizer: Tokenizer, token: str, index: int) -> None:
    used = tokenizer.token_to_id(token)
    if used != index:
        log.warning(
            f"the token {token!r} has the id {index} in added_tokens and {used} in the "
            "tokenizer; the latter is used, as in transformers"
        )
