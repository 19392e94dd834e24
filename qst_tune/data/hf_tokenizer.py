"""Builds the tokenizer of a Hugging Face directory; configs name this function."""

from pathlib import Path

from qst_tune.data.chat_tokenizer import HFChatTokenizer, special_ids
from qst_tune.data.template_source import directory_template, given_template
from qst_tune.data.tokenizer_files import read_tokenizer
from qst_tune.data.turn_end import special_pattern
from qst_tune.errors import UserError
from qst_tune.json_files import read_json


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
    tokenizer, special_tokens = read_tokenizer(directory)
    special = special_pattern(special_ids(tokenizer))
    template = (
        given_template(chat_template, special_tokens, special)
        if chat_template
        else directory_template(directory, special_tokens)
    )
    return HFChatTokenizer(
        tokenizer,
        special_tokens,
        template,
        max_seq_len=max_seq_len,
        extra_stop_tokens=_generation_stop_tokens(directory),
        pad_token=pad_token,
    )


def _generation_stop_tokens(directory: Path) -> list[int]:
    eos = read_json(directory / "generation_config.json", optional=True).get("eos_token_id")
    if eos is None:
        return []
    return list(eos) if isinstance(eos, list) else [eos]
