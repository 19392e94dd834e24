"""A user's own examples in any usual form: the default dataset of the configs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, Message, truncate, validate_messages
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from qst_tune.data.chat.messages import Conversation
from qst_tune.data.rows.forms import (
    Form,
    Pair,
    Sample,
    Text,
    check_column_map,
    find_form,
    no_form,
    read_row,
    with_system,
)
from qst_tune.data.rows.local_files import FORMATS, NamedRows, read_hub, read_local_files
from qst_tune.data.values import JsonObject, names_of
from qst_tune.errors import UserError

Row = dict[str, list[int]]

# torchtune's name for the answer of a tool.
_TORCHTUNE_ROLES = {"tool": "ipython"}


@dataclass(frozen=True)
class Prompts:
    """Settings that change the messages of every row."""

    system_prompt: str | None = None  # for conversations that have none
    new_system_prompt: str | None = None  # for all conversations; it replaces their own
    train_on_input: bool = False  # learn every message, not only the assistant's

    def apply(self, sample: Sample) -> Sample:
        """Return a sample with the system prompt and the learnt messages of these settings."""
        prompt = self.new_system_prompt or self.system_prompt
        if prompt:
            sample = with_system(sample, prompt, replace=bool(self.new_system_prompt))
        if self.train_on_input and isinstance(sample, Conversation):
            return Conversation(sample.messages, [True] * len(sample.messages), sample.tools)
        return sample


class AutoDataset(Dataset[Row]):
    """Rows of one form as tokens and labels, cut to the tokenizer's ``max_seq_len``.

    ``column_map`` has columns of the rows by the names of a form. The ``form`` is the one that fits
    the columns of the first row; UserError if none does, or there is no row.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        rows: NamedRows,
        *,
        column_map: Mapping[str, str],
        prompts: Prompts,
    ) -> None:
        self.tokenizer = tokenizer
        self.rows = rows
        self.column_map = dict(column_map)
        self.prompts = prompts
        first = self._first_readable()
        check_column_map(self.column_map, list(first))
        form = find_form(self._renamed(first), self.column_map)
        if form is None:
            raise no_form(first)
        self.form: Form = form
        self._unread = [c for c in self._renamed(first) if c not in form.columns]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        """Tokenize a row; a row that cannot be used is a UserError that names the column.

        The keys are ``tokens`` and ``labels``; for a preference ``chosen_input_ids``,
        ``chosen_labels``, ``rejected_input_ids`` and ``rejected_labels``.
        """
        sample = self.prompts.apply(read_row(self.form, self._renamed(self.rows[index])))
        if isinstance(sample, Text):
            tokens = _tokenize_text(self.tokenizer, sample.text)
            return {"tokens": tokens, "labels": list(tokens)}
        if isinstance(sample, Pair):
            chosen = self._encode(sample.chosen, "chosen_input_ids", "chosen_labels")
            return chosen | self._encode(sample.rejected, "rejected_input_ids", "rejected_labels")
        return self._encode(sample, "tokens", "labels")

    def place(self, index: int) -> str:
        """Return the number, file and line of a row, for messages."""
        return self.rows.place(index)

    def describe(self) -> str:
        """Describe in one line where the rows come from and how they are read."""
        mapped = ", ".join(f"{name} from {column}" for name, column in self.column_map.items())
        unread = f"; not read: {names_of(self._unread)}" if self._unread else ""
        return f"{self.rows.name}: form {self.form.name}{f' ({mapped})' * bool(mapped)}{unread}"

    def _first_readable(self) -> JsonObject:
        """Return the first valid row: whether others are skipped is decided elsewhere."""
        error: UserError | None = None
        for index in range(len(self.rows)):
            try:
                return self.rows[index]
            except UserError as caught:
                error = error or UserError(f"{self.place(index)} cannot be used: {caught}")
        raise error or UserError(f"{self.rows.name} has no rows")

    def _renamed(self, row: JsonObject) -> JsonObject:
        used = {*self.column_map, *self.column_map.values()}
        mapped = {name: row[column] for name, column in self.column_map.items() if column in row}
        return {**mapped, **{column: v for column, v in row.items() if column not in used}}

    def _encode(self, conversation: Conversation, tokens_key: str, labels_key: str) -> Row:
        tokens, mask = _tokenize_conversation(self.tokenizer, conversation)
        labels = [
            CROSS_ENTROPY_IGNORE_IDX if is_masked else token
            for token, is_masked in zip(tokens, mask, strict=True)
        ]
        return {tokens_key: tokens, labels_key: labels}


def auto_dataset(  # noqa: PLR0913 - a component of the config, whose keys these are
    tokenizer: ModelTokenizer,
    *,
    data_files: str | Sequence[str] | None = None,
    source: str | None = None,
    split: str = "train",
    column_map: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    new_system_prompt: str | None = None,
    train_on_input: bool = False,
    packed: bool = False,
    split_across_pack: bool = False,
    name: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
) -> AutoDataset:
    """Load examples in any usual form, from local files or the hub; read on access.

    In a torchtune config::

        dataset:
          _component_: qst_tune.data.auto_dataset
          data_files: my.jsonl

    The columns of the first row decide the form (docs/data.md): ``messages``, ``conversations``,
    ``instruction`` and ``output``, ``prompt`` and ``completion``, ``input`` and ``output``,
    ``text``, or ``chosen`` and ``rejected``.

    Args:
        tokenizer (ModelTokenizer): of torchtune's interface.
        data_files (str | Sequence[str] | None): local files or glob patterns: JSONL, JSON, CSV,
            TSV or Parquet; text files also as ``.gz``. They take precedence over ``source``.
        source (str | None): name of a dataset on the hub; or the format of ``data_files`` (json,
            csv, tsv, parquet) if their suffix does not say it.
        split (str): of the source, or a part such as ``train[:1000]``.
        column_map (Mapping[str, str] | None): columns of the rows by the names of a form.
        system_prompt (str | None): for conversations that have none.
        new_system_prompt (str | None): for all conversations; it replaces their own.
        train_on_input (bool): learn every message, not only the assistant's.
        packed (bool): several examples in each sequence. The recipe packs; here it must be False.
        split_across_pack (bool): with ``packed``, let an example continue in the next pack.
        name (str | None): configuration of the source, as in ``datasets.load_dataset``.
        data_dir (str | None): as in ``datasets.load_dataset``.
        revision (str | None): as in ``datasets.load_dataset``.

    Returns:
        AutoDataset: the dataset.

    Raises:
        UserError: if there are no rows, they cannot be read or fit no form.
    """
    if packed or split_across_pack:
        # Rows are checked before they are packed: batches/packing.py takes these two away.
        raise UserError("packed and split_across_pack go together, in the config of a recipe")
    if system_prompt and new_system_prompt:
        raise UserError(
            "system_prompt (for conversations without one) and new_system_prompt (in the place of "
            "all) exclude each other: remove one"
        )
    rows: NamedRows
    if data_files:
        rows = read_local_files(data_files, source=source, split=split)
    elif source is None or source in FORMATS.values():
        raise UserError("there are no rows: set dataset.data_files=my.jsonl, or dataset.source")
    else:
        rows = read_hub(source, split, name=name, data_dir=data_dir, revision=revision)
    prompts = Prompts(system_prompt, new_system_prompt, train_on_input)
    return AutoDataset(tokenizer, rows, column_map=column_map or {}, prompts=prompts)


def _tokenize_text(tokenizer: ModelTokenizer, text: str) -> list[int]:
    """Tokenize text without roles; longer than ``max_seq_len``, it loses its end."""
    tokens: list[int] = tokenizer.encode(text, add_bos=True, add_eos=True)
    limit = getattr(tokenizer, "max_seq_len", None)
    return tokens if limit is None else list(truncate(tokens, limit))


def _tokenize_conversation(
    tokenizer: ModelTokenizer, conversation: Conversation
) -> tuple[list[int], list[bool]]:
    """Tokenize messages: token ids, and for each True where no loss is taken.

    Only our tokenizer takes tools. A conversation that the tokenizer or its template cannot express
    is a UserError.
    """
    if hasattr(tokenizer, "tokenize_conversation"):
        tokens, mask = tokenizer.tokenize_conversation(
            conversation.messages, tools=conversation.tools, learnt=conversation.learnt
        )
        return tokens, mask
    if conversation.tools or any("tool_calls" in message for message in conversation.messages):
        raise UserError(
            f"it has tools or tool calls, which {type(tokenizer).__name__} cannot express: use the "
            "tokenizer qst_tune.data.hf_chat_tokenizer with the model's own chat template"
        )
    messages = [
        Message(
            role=_TORCHTUNE_ROLES.get(message["role"], message["role"]),
            content=message["content"],
            masked=not learnt,
        )
        for message, learnt in zip(conversation.messages, conversation.learnt, strict=True)
    ]
    validate_messages(messages)
    tokens, mask = tokenizer.tokenize_messages(messages)
    return tokens, mask
