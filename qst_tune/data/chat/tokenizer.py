"""A torchtune model tokenizer for any Hugging Face directory, with its own chat template."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from torchtune.data import Message, truncate
from torchtune.modules.transforms import Transform
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from qst_tune.data.chat.learnt_spans import RenderedChat, Span, find_learnt_spans
from qst_tune.data.chat.messages import check_messages, from_torchtune
from qst_tune.data.chat.template import (
    ChatTemplate,
    Messages,
    Tools,
    TurnEnd,
    find_stop_strings,
    find_turn_end,
    special_pattern,
)
from qst_tune.data.chat.template_source import no_template
from qst_tune.data.values import JsonObject
from qst_tune.errors import UserError


class HFChatTokenizer(ModelTokenizer, Transform):
    """Tokenizes whole conversations with the chat template a model was trained with.

    The conversation is rendered once and tokenized once, so its tokens are those of transformers'
    ``apply_chat_template`` for every content. torchtune's tokenizers encode header and content
    apart, which gives other tokens when the content starts with white space. Character offsets then
    tell which tokens belong to which message.

    No loss (mask True) is taken on messages with ``masked=True``, on the header of an assistant
    message (it is given at inference), or on what the template writes after its end token. The end
    token itself is learnt, otherwise the model never learns to stop. A token that spans header and
    content belongs to the header.

    ``special_tokens`` are those with a name, such as ``eos_token``, which must be there. Without a
    ``chat_template`` only plain text can be tokenized. ``extra_stop_tokens`` end generation in
    addition to ``eos_id`` and to the ids with which the template ends an answer; ``pad_token``
    replaces the model's own. A named token that is not in the vocabulary is a UserError.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: ChatTemplate | None,
        *,
        max_seq_len: int | None = None,
        extra_stop_tokens: Sequence[int] = (),
        pad_token: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.chat_template = chat_template
        self.max_seq_len = max_seq_len
        self._extra_stop_tokens = tuple(extra_stop_tokens)
        self.special_tokens = special_ids(tokenizer)
        eos_id = self._token_id("eos_token", special_tokens.get("eos_token"))
        if eos_id is None:
            raise UserError(
                "the tokenizer names no eos_token; add one to tokenizer_config.json, training "
                "needs a token to stop with"
            )
        self.eos_id = eos_id
        self.bos_id = self._token_id("bos_token", special_tokens.get("bos_token"))
        pad_id = self._token_id("pad_token", pad_token or special_tokens.get("pad_token"))
        self.pad_id = eos_id if pad_id is None else pad_id

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def date(self) -> datetime | None:
        """What the template writes as today's date; None if it writes none."""
        template = self.chat_template
        return template.date if template is not None and template.writes_date else None

    @date.setter
    def date(self, date: datetime) -> None:
        if self.chat_template is not None:
            self.chat_template.date = date

    @cached_property
    def stop_tokens(self) -> list[int]:
        """Ids that end generation: ``eos_id``, then those of the template and of the model."""
        ends = find_stop_strings(self.chat_template, self._turn_end) if self.chat_template else []
        of_template = [self.special_tokens[end] for end in ends]
        return list(dict.fromkeys((self.eos_id, *of_template, *self._extra_stop_tokens)))

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Encode plain text, without the chat template.

        ``add_bos`` begins as the tokenizer's post-processor does: Llama's and Gemma's put
        ``bos_id`` there, those of SmolLM2 and Qwen nothing. ``add_eos`` appends ``eos_id``.
        """
        ids = list(self._encoding(text).ids)
        if add_bos:
            ids = [*self._first_ids, *ids]
        return [*ids, self.eos_id] if add_eos else ids

    def _encoding(self, text: str) -> Any:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise UserError(
                "the text has half a character (a lone surrogate): delete it"
            ) from error

    @cached_property
    def _first_ids(self) -> list[int]:
        """Ids that the post-processor puts before a text."""
        alone = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        starts = range(len(whole) - len(alone) + 1)
        start = next((i for i in starts if whole[i : i + len(alone)] == alone), 0)
        return list(whole[:start])

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode token ids; does not stop at ``eos_id``, which may also end a prompt's turns."""
        ids = list(token_ids)
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def tokenize_messages(
        self, messages: Sequence[Message], *, add_end_tokens: bool = True
    ) -> tuple[list[int], list[bool]]:
        """Tokenize torchtune's messages, text only; see :meth:`tokenize_conversation`.

        Messages that are not ``masked`` are learnt.
        """
        learnt = [not message.masked for message in messages]
        messages = from_torchtune(messages)
        return self.tokenize_conversation(messages, learnt=learnt, add_end_tokens=add_end_tokens)

    def tokenize_conversation(
        self,
        messages: Sequence[JsonObject],
        *,
        tools: Sequence[JsonObject] | None = None,
        learnt: Sequence[bool] | None = None,
        add_end_tokens: bool = True,
    ) -> tuple[list[int], list[bool]]:
        """Tokenize messages and ``tools``, as transformers' ``apply_chat_template`` takes them.

        Returns token ids, and for each True where no loss is taken. ``learnt`` has a flag for each
        message; None: the assistant's are learnt. Both are cut to ``max_seq_len``; then, in
        training, the last token is ``eos_id`` without loss, as in torchtune's tokenizers.

        With ``add_end_tokens=False``, for generation, the text ends with the header of an assistant
        message, and the content of a last assistant message for the model to continue. UserError if
        there is no message, one is malformed, or the template refuses the conversation or leaves
        out a learnt text.
        """
        template = self.chat_template
        if template is None:
            raise no_template()
        checked = check_messages(messages)
        if learnt is None:
            learnt = [message["role"] == "assistant" for message in checked]
        if len(learnt) != len(checked):
            raise UserError(f"learnt has {len(learnt)} values for {len(checked)} messages")
        if not add_end_tokens:
            text = _render_for_generation(template, checked, tools)
            tokens = self._encoding(text).ids
            return self._truncate(list(tokens), [True] * len(tokens), add_end_tokens)
        text = template.render(checked, tools=tools)
        chat = RenderedChat(template, checked, tools, text, self._turn_end)
        encoding = self._encoding(text)
        mask = _mask(encoding.offsets, find_learnt_spans(chat, learnt))
        return self._truncate(list(encoding.ids), mask, add_end_tokens)

    def __call__(self, sample: dict[str, Any], inference: bool = False) -> JsonObject:
        """Replace the sample's torchtune ``messages`` by ``tokens`` and ``mask``, in place.

        With ``inference`` the tokens end with the template's generation prompt.
        """
        messages = sample.pop("messages")
        sample["tokens"], sample["mask"] = self.tokenize_messages(
            messages, add_end_tokens=not inference
        )
        return sample

    def _token_id(self, name: str, token: str | None) -> int | None:
        token_id: int | None = None if token is None else self._tokenizer.token_to_id(token)
        if token is not None and token_id is None:
            raise UserError(f"{name} {token!r} is not in the tokenizer's vocabulary; correct it")
        return token_id

    @cached_property
    def _turn_end(self) -> TurnEnd:
        if self.chat_template is None:
            raise no_template()
        return find_turn_end(self.chat_template, special_pattern(self.special_tokens))

    def _truncate(
        self, tokens: list[int], mask: list[bool], add_end_tokens: bool
    ) -> tuple[list[int], list[bool]]:
        if self.max_seq_len is None or len(tokens) <= self.max_seq_len:
            return tokens, mask
        eos_id, eos_mask = (self.eos_id, True) if add_end_tokens else (None, None)
        limit = self.max_seq_len
        return truncate(tokens, limit, eos_id), truncate(mask, limit, eos_mask)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return every special token of a tokenizer and its id."""
    added = tokenizer.get_added_tokens_decoder()
    return {token.content: index for index, token in added.items() if token.special}


def _render_for_generation(template: ChatTemplate, messages: Messages, tools: Tools | None) -> str:
    # torchtune's generate recipe ends its prompt with an empty assistant message.
    start = ""
    if messages[-1]["role"] == "assistant":
        messages, start = messages[:-1], messages[-1].get("content", "")
    text = template.render(messages, tools=tools, add_generation_prompt=True)
    if tools and text == template.render(messages, add_generation_prompt=True):
        raise UserError("the chat template does not render the tools; leave them out")
    return text + start


def _mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Return True for every token without loss; the first character of a token decides."""
    mask = [True] * len(offsets)
    starts = [first for first, _ in offsets]
    for start, end in spans:
        first, last = bisect_left(starts, start), bisect_left(starts, end)
        mask[first:last] = [False] * (last - first)
    return mask
