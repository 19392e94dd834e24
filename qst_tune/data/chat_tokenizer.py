"""A torchtune model tokenizer for any Hugging Face folder, with the model's own chat template."""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torchtune.data import Message, truncate
from torchtune.modules.transforms import Transform
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from qst_tune.data.chat_messages import check_messages, from_torchtune
from qst_tune.data.chat_template import ChatTemplate, Messages, Tools
from qst_tune.data.learnt_spans import find_learnt_spans
from qst_tune.data.rendered_chat import RenderedChat, Span
from qst_tune.data.turn_end import TurnEnd, find_turn_end, special_pattern
from qst_tune.errors import UserError

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class HFChatTokenizer(ModelTokenizer, Transform):
    """Tokenizes whole conversations with the chat template a model was trained with.

    The conversation is rendered once and tokenized once, so its tokens are those of transformers'
    ``apply_chat_template`` for every content; encoding header and content apart, as torchtune's
    tokenizers do, gives others when the content starts with white space. Character offsets then
    tell which tokens belong to which message.

    No loss (mask True) falls on messages with ``masked=True``, on the header of an assistant
    message (it is given at inference), and on what the template writes after its end token. The
    end token itself is trained on, otherwise the model never learns to stop. A token that spans
    header and content belongs to the header.

    Args:
        tokenizer (Tokenizer): the fast tokenizer.
        chat_template (ChatTemplate): the model's template and named special tokens.
        max_seq_len (int | None): longer conversations are cut; None for no limit.
        extra_stop_tokens (Sequence[int]): token ids that end generation beside ``eos_id``.
        pad_token (str | None): padding token in place of the model's own.

    Attributes:
        special_tokens (dict[str, int]): every special token and its id.
        bos_id (int | None): begin-of-sequence token, None if the model has none.
        eos_id (int): end-of-sequence token.
        pad_id (int): padding token; ``eos_id`` if the model has none.
        stop_tokens (list[int]): tokens that end generation, ``eos_id`` first.

    Raises:
        ValueError: if the model names no ``eos_token``, or names a token its vocabulary lacks.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        *,
        max_seq_len: int | None = None,
        extra_stop_tokens: Sequence[int] = (),
        pad_token: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self.max_seq_len = max_seq_len
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = {t.content: i for i, t in added.items() if t.special}
        eos_id = self._named_token_id("eos_token")
        if eos_id is None:
            raise ValueError(
                "the tokenizer names no eos_token; add one to tokenizer_config.json, training "
                "needs a token to stop with"
            )
        self.eos_id = eos_id
        self.bos_id = self._named_token_id("bos_token")
        named = chat_template.special_tokens.get("pad_token")
        pad_id = self._token_id("pad_token", pad_token or named)
        self.pad_id = eos_id if pad_id is None else pad_id
        self.stop_tokens = list(dict.fromkeys((self.eos_id, *extra_stop_tokens)))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Encode plain text, without the chat template.

        Args:
            text (str): the text.
            add_bos (bool): prepend ``bos_id`` if the model has one.
            add_eos (bool): append ``eos_id``.

        Returns:
            list[int]: token ids.
        """
        ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if add_bos and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        return [*ids, self.eos_id] if add_eos else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode token ids; does not stop at ``eos_id``, which may also end a prompt's turns.

        Args:
            token_ids (Sequence[int]): token ids.
            skip_special_tokens (bool): leave special tokens out of the text.

        Returns:
            str: the text.
        """
        ids = list(token_ids)
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def tokenize_messages(
        self, messages: Sequence[Message], *, add_end_tokens: bool = True
    ) -> tuple[list[int], list[bool]]:
        """Tokenize a conversation of torchtune's messages; see :meth:`tokenize_conversation`.

        Args:
            messages (Sequence[Message]): text only; loss is taken where ``masked`` is False.
            add_end_tokens (bool): False for generation.

        Returns:
            tuple[list[int], list[bool]]: token ids, and for each True where no loss is taken.
        """
        return self.tokenize_conversation(
            from_torchtune(messages),
            learnt=[not message.masked for message in messages],
            add_end_tokens=add_end_tokens,
        )

    def tokenize_conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        learnt: Sequence[bool] | None = None,
        add_end_tokens: bool = True,
    ) -> tuple[list[int], list[bool]]:
        """Tokenize a conversation.

        Args:
            messages (Sequence[Mapping[str, Any]]): as transformers' ``apply_chat_template`` takes
                them: ``role``, ``content`` (text, text parts or None), ``tool_calls``, ``name``,
                ``reasoning_content`` and whatever else the template reads.
            tools (Sequence[Mapping[str, Any]] | None): JSON schemas, given to the template.
            learnt (Sequence[bool] | None): for each message whether it takes loss; None: the
                assistant's do.
            add_end_tokens (bool): True for training. False for generation: the text ends with the
                header of an assistant message, followed by the content of a last assistant
                message, if there is one, for the model to continue.

        Returns:
            tuple[list[int], list[bool]]: token ids, and for each True where no loss is taken.
                Both are cut to ``max_seq_len``; then, in training, the last token is ``eos_id``
                without loss, as in torchtune's tokenizers.

        Raises:
            UserError: if there is no message, one is malformed, the template refuses the
                conversation or leaves out what is to be learnt.
        """
        checked = check_messages(messages)
        if learnt is None:
            learnt = [message["role"] == "assistant" for message in checked]
        if len(learnt) != len(checked):
            raise UserError(f"learnt has {len(learnt)} values for {len(checked)} messages")
        if not add_end_tokens:
            text = self._render_for_generation(checked, tools)
            tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
            return self._truncate(list(tokens), [True] * len(tokens), add_end_tokens)
        text = self._chat_template.render(checked, tools=tools)
        chat = RenderedChat(self._chat_template, checked, tools, text, self._turn_end)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        mask = _mask(encoding.offsets, find_learnt_spans(chat, learnt))
        return self._truncate(list(encoding.ids), mask, add_end_tokens)

    def __call__(self, sample: dict[str, Any], inference: bool = False) -> Mapping[str, Any]:
        """Replace the sample's ``messages`` by ``tokens`` and ``mask``, in place.

        Args:
            sample (dict[str, Any]): has a list of torchtune messages under ``messages``.
            inference (bool): end with the template's generation prompt.

        Returns:
            Mapping[str, Any]: the sample.
        """
        messages = sample.pop("messages")
        sample["tokens"], sample["mask"] = self.tokenize_messages(
            messages, add_end_tokens=not inference
        )
        return sample

    def _named_token_id(self, name: str) -> int | None:
        return self._token_id(name, self._chat_template.special_tokens.get(name))

    def _token_id(self, name: str, token: str | None) -> int | None:
        if token is None:
            return None
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"{name} {token!r} is not in the tokenizer's vocabulary; correct it")
        return int(token_id)

    @cached_property
    def _turn_end(self) -> TurnEnd:
        return find_turn_end(self._chat_template, special_pattern(self.special_tokens))

    def _render_for_generation(self, messages: Messages, tools: Tools | None) -> str:
        # torchtune's generate recipe ends its prompt with an empty assistant message.
        start = ""
        if messages[-1]["role"] == "assistant":
            messages, start = messages[:-1], messages[-1].get("content", "")
        return self._chat_template.render(messages, tools=tools, add_generation_prompt=True) + start

    def _truncate(
        self, tokens: list[int], mask: list[bool], add_end_tokens: bool
    ) -> tuple[list[int], list[bool]]:
        if self.max_seq_len is None or len(tokens) <= self.max_seq_len:
            return tokens, mask
        eos_id, eos_mask = (self.eos_id, True) if add_end_tokens else (None, None)
        return (
            truncate(tokens, self.max_seq_len, eos_id),
            truncate(mask, self.max_seq_len, eos_mask),
        )


def _mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Return True for every token without loss, by the place of its first character."""
    mask = [True] * len(offsets)
    starts = [first for first, _ in offsets]
    for start, end in spans:
        first, last = bisect_left(starts, start), bisect_left(starts, end)
        mask[first:last] = [False] * (last - first)
    return mask


def hf_chat_tokenizer(
    path: str,
    max_seq_len: int | None = None,
    chat_template: str | None = None,
    pad_token: str | None = None,
) -> HFChatTokenizer:
    """Build a tokenizer from a local Hugging Face folder; never touches the network.

    In a torchtune config::

        tokenizer:
          _component_: qst_tune.data.hf_chat_tokenizer
          path: ${checkpoint_dir}
          max_seq_len: 2048

    Args:
        path (str): folder with ``tokenizer.json`` (or ``vocab.json`` and ``merges.txt``),
            ``tokenizer_config.json`` and, if the template is not in the latter,
            ``chat_template.jinja``.
        max_seq_len (int | None): longer conversations are cut; None for no limit.
        chat_template (str | None): Jinja template in place of the folder's; base models have none.
        pad_token (str | None): padding token in place of the folder's. In many chat models that is
            a token of the template, which torchtune's ``generate`` would then mask in a prompt.

    Returns:
        HFChatTokenizer: the tokenizer.

    Raises:
        ValueError: if the folder, its ``tokenizer.json`` or a chat template is absent.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"tokenizer folder {folder} does not exist; download the model first")
    tokenizer = _read_tokenizer(folder)
    config = _read_json(folder / "tokenizer_config.json")
    special_tokens = _named_special_tokens(
        {**_read_json(folder / "special_tokens_map.json"), **config}
    )
    # The file may carry the settings of whoever saved it; they would cut or pad every text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return HFChatTokenizer(
        tokenizer,
        ChatTemplate(chat_template or _read_template(folder, config), special_tokens),
        max_seq_len=max_seq_len,
        extra_stop_tokens=_generation_stop_tokens(folder),
        pad_token=pad_token,
    )


def _read_tokenizer(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        # The older format of GPT-2 and OPT. Imported here: it takes seconds, and few need it.
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    raise ValueError(
        f"{folder} has no tokenizer.json; save the tokenizer in the fast format, or use a "
        "torchtune tokenizer"
    )


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _named_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {name: config.get(name) for name in _NAMED_TOKENS}
    # A token is a string, or a dict with its stripping rules beside its content.
    return {
        name: token["content"] if isinstance(token, dict) else str(token)
        for name, token in tokens.items()
        if token is not None
    }


def _read_template(folder: Path, config: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        # Several templates by name; the others are for tool use and retrieval.
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not template:
        raise ValueError(
            f"{folder} has no chat template; add one (chat_template.jinja), name one with "
            "tokenizer.chat_template, or use a torchtune tokenizer"
        )
    return str(template)


def _generation_stop_tokens(folder: Path) -> list[int]:
    eos = _read_json(folder / "generation_config.json").get("eos_token_id")
    if eos is None:
        return []
    return list(eos) if isinstance(eos, list) else [eos]
