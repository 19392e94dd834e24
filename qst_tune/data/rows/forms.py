"""The forms of rows, known by their columns, and the meaning of each row."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qst_tune.data.chat.messages import Conversation, read_conversation, read_tools
from qst_tune.data.values import kind_of, names_of, text_of
from qst_tune.errors import UserError, did_you_mean

Row = Mapping[str, Any]

# Names of columns from which :func:`nearest` guesses, the surest first.
_QUESTIONS = ("question", "query", "instruction", "prompt", "input", "user", "source", "problem")
_ANSWERS = (
    *("answer", "response", "output", "completion", "assistant"),
    *("target", "reply", "solution", "answers"),
)
_CONTEXTS = ("context", "input", "passage")
_TEXTS = ("text", "content", "document", "body", "article", "sentence", "code")


@dataclass(frozen=True)
class Text:
    """Text without roles, learnt as a whole."""

    text: str


@dataclass(frozen=True)
class Pair:
    """Two conversations that begin alike, the first with the better answer."""

    chosen: Conversation
    rejected: Conversation


Sample = Conversation | Pair | Text


@dataclass(frozen=True)
class Form:
    """One form of rows."""

    needed: tuple[str, ...]  # columns that every row has
    optional: tuple[str, ...]  # columns that a row may have
    read: Callable[[Row], Sample]  # from a row to its meaning

    @property
    def name(self) -> str:
        """The needed columns as text."""
        return ", ".join(self.needed)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.needed, *self.optional)


def read_row(form: Form, row: Row) -> Sample:
    """Return the meaning of a row, with its system prompt and tools.

    A missing value, or one of a wrong type, is a UserError that names it.
    """
    missing = [column for column in form.needed if column not in row]
    if missing:
        raise UserError(f"it has no column {missing[0]!r}: its columns are {names_of(row)}")
    sample = form.read(row)
    system = row.get("system") if "system" in form.columns else None
    if not system:
        return sample
    return with_system(sample, text_of(system, "column 'system'"), replace=False)


def with_system(sample: Sample, prompt: str, *, replace: bool) -> Sample:
    """Begin a conversation with a system prompt; ``replace`` drops those of the row."""
    if isinstance(sample, Pair):
        return Pair(*(_begin(side, prompt, replace) for side in (sample.chosen, sample.rejected)))
    return sample if isinstance(sample, Text) else _begin(sample, prompt, replace)


def find_form(columns: Collection[str], wanted: Collection[str] = ()) -> Form | None:
    """Find the first form that fits the columns and reads all that the user named (``wanted``)."""
    fitting = (f for f in FORMS if {*f.needed} <= {*columns} and {*wanted} <= {*f.columns})
    return next(fitting, None)


def no_form(row: Row) -> UserError:
    """Return the error for rows without a form: their columns, the forms and the nearest one."""
    known = "; ".join(form.name for form in FORMS)
    found = f"the columns {names_of(row)}" if row else "no columns"
    guess = nearest(row)
    advice = "rename columns with dataset.column_map.<name>=<column of yours>"
    if guess:
        renamed = {name: column for name, column in guess.items() if name != column}
        mapping = " ".join(
            f"dataset.column_map.{name}={names_of([c])}" for name, c in renamed.items()
        )
        advice = f"the nearest is {', '.join(guess)}: set {mapping}"
    return UserError(f"the rows have {found}, and no form has these ({known}); {advice}")


def nearest(row: Row) -> dict[str, str]:
    """Guess the columns of the first row for a form, from names and then types; may be empty."""
    lists = [name for name, value in row.items() if _is_conversation(value)]
    if lists:
        return {"messages": lists[0]}
    texts = [name for name, value in row.items() if isinstance(value, str)]
    question, answer = _match(texts, _QUESTIONS), _match(texts, _ANSWERS)
    context = _match([name for name in texts if name not in (question, answer)], _CONTEXTS)
    if question and answer and context:
        return {"instruction": question, "input": context, "output": answer}
    if question and answer:
        return {"input": question, "output": answer}
    text = _match(texts, _TEXTS)
    if text or len(texts) == 1:
        return {"text": text or texts[0]}
    return dict(zip(("input", "output"), texts, strict=True)) if len(texts) == 2 else {}


def check_column_map(column_map: Mapping[str, str], columns: list[str]) -> None:
    """Refuse a map with an unknown name or column; the UserError names the wrong entry."""
    names = list(dict.fromkeys(name for form in FORMS for name in form.columns))
    for name, column in column_map.items():
        if name not in names:
            raise UserError(
                f"column_map.{name}={column}: {name!r} is no column of a form; it must be one of "
                f"{', '.join(names)}{did_you_mean(name, names)}"
            )
        if column not in columns:
            raise UserError(
                f"column_map.{name}={column}: there is no column {column!r}, only "
                f"{names_of(columns)}{did_you_mean(column, columns)}"
            )


def _begin(conversation: Conversation, prompt: str, replace: bool) -> Conversation:
    has_own = [message["role"] == "system" for message in conversation.messages]
    if any(has_own) and not replace:
        return conversation
    kept = [i for i, is_system in enumerate(has_own) if not is_system]
    messages = [conversation.messages[i] for i in kept]
    learnt = [conversation.learnt[i] for i in kept]
    system = {"role": "system", "content": prompt}
    return Conversation([system, *messages], [False, *learnt], conversation.tools)


def _column(row: Row, column: str) -> str:
    return text_of(row[column], f"column {column!r}")


def _turn(prompt: str, answer: str, tools: object = None) -> Conversation:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Conversation(messages, [False, True], read_tools(tools))


def _instruction(row: Row) -> Conversation:
    """One user turn: the model's own chat template is the prompt, not Alpaca's sentences."""
    parts = [_column(row, "instruction")]
    if row.get("input") is not None:
        parts.append(_column(row, "input"))
    return _turn("\n\n".join(part for part in parts if part), _column(row, "output"))


def _prompt_completion(row: Row) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _turn(prompt, completion, row.get("tools"))
    return _joined(row, "completion")


def _joined(row: Row, answer: str) -> Conversation:
    """A prompt and an answer, each text or messages; only the answer is learnt."""
    tools = read_tools(row.get("tools"))
    after = _as_conversation(row[answer], answer, "assistant")
    if row.get("prompt") is None or after.messages[0]["role"] != "assistant":
        return Conversation(after.messages, after.learnt, tools)  # a whole conversation
    before = _as_conversation(row["prompt"], "prompt", "user")
    learnt = [False] * len(before.messages) + after.learnt
    return Conversation([*before.messages, *after.messages], learnt, tools)


def _as_conversation(value: object, column: str, role: str) -> Conversation:
    if isinstance(value, str):
        return Conversation([{"role": role, "content": value}], [role == "assistant"])
    if not isinstance(value, list):
        raise UserError(
            f"column {column!r} is {kind_of(value)}: it must be text or a list of messages"
        )
    return read_conversation(value, column)


def _preference(row: Row) -> Pair:
    has_text = isinstance(row["chosen"], str) or isinstance(row["rejected"], str)
    if has_text and row.get("prompt") is None:
        raise UserError("'chosen' and 'rejected' are text, so it needs a column 'prompt'")
    chosen, rejected = _joined(row, "chosen"), _joined(row, "rejected")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not any(side.learnt):
            raise UserError(f"column {name!r} has no answer: it must end with an assistant message")
    return Pair(chosen, rejected)


def _messages(column: str) -> Callable[[Row], Conversation]:
    return lambda row: read_conversation(row[column], column, row.get("tools"))


_CONTEXT = ("system", "tools")
# The first that fits: rows with the columns of several have more than the later ones read.
FORMS = (
    Form(("chosen", "rejected"), ("prompt", *_CONTEXT), _preference),
    Form(("messages",), _CONTEXT, _messages("messages")),
    Form(("conversations",), _CONTEXT, _messages("conversations")),
    Form(("instruction", "output"), ("input", "system"), _instruction),
    Form(("prompt", "completion"), _CONTEXT, _prompt_completion),
    Form(
        ("input", "output"),
        ("system",),
        lambda row: _turn(_column(row, "input"), _column(row, "output")),
    ),
    Form(("text",), (), lambda row: Text(_column(row, "text"))),
)


def _match(columns: list[str], words: tuple[str, ...]) -> str | None:
    """The column whose name equals, or else contains, the earliest of some words."""
    equal = [c for word in words for c in columns if c.lower() == word]
    containing = [c for word in words for c in columns if word in c.lower()]
    return next(iter([*equal, *containing]), None)


def _is_conversation(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    return is_list and bool({"role", "from"} & value[0].keys())
