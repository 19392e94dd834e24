"""Builds the tokenizer of a Hugging Face directory; configs name this function."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torchtune import utils

from qst_tune.data.chat.template import special_pattern
from qst_tune.data.chat.template_source import directory_template, given_template
from qst_tune.data.chat.tokenizer import HFChatTokenizer, special_ids
from qst_tune.data.values import JsonObject, quoted
from qst_tune.errors import UserError
from qst_tune.json_files import read_json

log = utils.get_logger("INFO")

# Classes that take tokenizer.json as it is. transformers 5 rebuilds the others, with rules of
# their own for white space, and it reads files without tokenizer.json (OPT, sentencepiece).
_PLAIN_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
_SMALLEST_VOCABULARY = 32


def hf_chat_tokenizer(
    path: str,
    max_seq_len: int | None = None,
    chat_template: str | None = None,
    pad_token: str | None = None,
) -> HFChatTokenizer:
    """Build a tokenizer from a local Hugging Face directory; never touches the network.

    In a torchtune config::

        tokenizer:
          _component_: qst_tune.data.hf_chat_tokenizer
          path: ${checkpoint_dir}
          max_seq_len: 2048

    Args:
        path (str): directory with ``tokenizer.json``, or what transformers reads without it, and
            ``tokenizer_config.json``; a chat template in the latter, in ``chat_template.jinja``
            or in ``additional_chat_templates``.
        max_seq_len (int | None): longer conversations are cut; None for no limit.
        chat_template (str | None): replaces the directory's: a name such as ``chatml``, the
            path of a file, or a Jinja template. Base models have none.
        pad_token (str | None): replaces the directory's padding token. In many chat models that
            is a token of the template, which torchtune's ``generate`` would then mask in a prompt.

    Returns:
        HFChatTokenizer: the tokenizer.

    Raises:
        UserError: if the directory or its tokenizer is absent or damaged, or the chat template is
            invalid.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"tokenizer: {directory} does not exist; download the model first")
    stop_tokens = _stop_tokens(directory / "generation_config.json")
    loaded = _load(directory)
    tokenizer: Tokenizer = loaded.backend_tokenizer
    # The file may carry the settings of whoever saved it; they would cut or pad every text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    named = loaded.special_tokens_map
    special_tokens = {name: token for name, token in named.items() if isinstance(token, str)}
    template = (
        given_template(chat_template, special_tokens, special_pattern(special_ids(tokenizer)))
        if chat_template
        else directory_template(loaded.chat_template, special_tokens, directory)
    )
    return HFChatTokenizer(
        tokenizer,
        special_tokens,
        template,
        max_seq_len=max_seq_len,
        extra_stop_tokens=stop_tokens,
        pad_token=pad_token,
    )


def _stop_tokens(path: Path) -> list[int]:
    eos = read_json(path, optional=True).get("eos_token_id")
    tokens = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(token) is not int or token < 0 for token in tokens):
        raise UserError(f"{path}: eos_token_id is {quoted(eos)}: it must be a token id, or a list")
    return tokens


def _load(directory: Path) -> Any:
    """Load the tokenizer that transformers' ``AutoTokenizer`` gives, with a fast form.

    A directory without a tokenizer, or with one that needs code of its own, is a UserError.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config = read_json(directory / "tokenizer_config.json", optional=True)
    is_plain = config.get("tokenizer_class") in _PLAIN_CLASSES or "auto_map" in config
    path = directory / "tokenizer.json"
    try:
        if path.is_file() and is_plain:
            loaded: Any = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        else:
            loaded = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    except (KeyboardInterrupt, SystemExit):
        raise
    # Files absent or damaged, libraries not installed; a panic of tokenizers is no Exception.
    except BaseException as error:
        reason = " ".join(str(error).split())[:200]
        if path.is_file():
            raise UserError(
                f"tokenizer: {path} or a file beside it is damaged, or needs code of its own: "
                f"{reason}; download the directory again, or use a torchtune tokenizer"
            ) from error
        raise UserError(
            f"tokenizer: {directory} has no tokenizer.json, and transformers cannot load its "
            f"tokenizer ({reason}); add tokenizer.json, or use a torchtune tokenizer"
        ) from error
    if not isinstance(getattr(loaded, "backend_tokenizer", None), Tokenizer):
        raise UserError(
            f"tokenizer: {directory} has a {type(loaded).__name__} without a fast form; save one "
            "with transformers (tokenizer.json), or use a torchtune tokenizer"
        )
    # Without any vocabulary file transformers makes a tokenizer of a few special tokens (5.23).
    if loaded.backend_tokenizer.get_vocab_size(with_added_tokens=False) < _SMALLEST_VOCABULARY:
        raise UserError(
            f"tokenizer: {directory} has no tokenizer.json and no other vocabulary: download it"
        )
    _report_conflicts(directory, config, loaded)
    return loaded


def _report_conflicts(directory: Path, config: JsonObject, loaded: Any) -> None:
    """Warn of special tokens that the directory's files give in two ways."""
    if "added_tokens_decoder" not in config:
        for name, token in read_json(directory / "special_tokens_map.json", optional=True).items():
            before, now = _content(config.get(name)), _content(token)
            if before is not None and before != now:
                log.warning(
                    f"{name} is {before!r} in tokenizer_config.json and {now!r} in "
                    "special_tokens_map.json; the latter is used, as in transformers"
                )
    for index, token in config.get("added_tokens_decoder", {}).items():
        used = loaded.backend_tokenizer.token_to_id(_content(token))
        if used != int(index):
            log.warning(
                f"the token {_content(token)!r} has the id {index} in added_tokens and {used} in "
                "the tokenizer; the latter is used, as in transformers"
            )


def _content(token: object) -> object:
    """A token is a string, or a dict with its content and stripping rules."""
    return token["content"] if isinstance(token, dict) else token
