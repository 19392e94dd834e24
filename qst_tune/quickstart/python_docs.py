"""Instruction data made from the documentation that every CPython carries."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qst_tune.quickstart.docs_parser import Paragraph, Passage, parse_topic

VAL_FRACTION = 0.1
# Most examples then have 100 to 250 tokens of SmolLM2 with the prompt.
_MAX_ANSWER_CHARS = 640
# Shorter answers are stubs such as "See section Exceptions."
_MIN_ANSWER_CHARS = 80
# A paragraph of this length in two places is the same text, not a common phrase.
_SAME_TEXT_CHARS = 40

_CALL = re.compile(r"(\w+ )?[\w.]+\([^()]*\)")
_DOTTED_NAME = re.compile(r"[\w]*[._][\w.]*")
_CODE = re.compile(r'(?<![\w"])"[^"\s][^"]{0,38}"(?!")')
_HAS_LETTER = re.compile(r"[^\W\d]")

_SECTION_QUESTIONS = (
    "Give an overview of {title} in Python.",
    "What should I know about {title} in Python?",
    "Tell me about {title} in Python.",
)
_SUBSECTION_QUESTIONS = (
    "In Python, on the subject of {root}: explain {title}.",
    "What should I know about {title} in Python ({root})?",
)
_DETAIL_QUESTIONS = (
    "On the subject of {title} in Python: what about {code}?",
    "How does {code} matter for {title} in Python?",
)
_CALL_QUESTIONS = (
    "What does {term} do in Python?",
    "In Python, what is {term} for?",
    "Explain {term} in Python.",
)
_NAME_QUESTIONS = ("What is {term} in Python?", "Explain {term} in Python.")
_TERM_QUESTIONS = (
    "In Python, on the subject of {title}: explain {term}.",
    "What is meant by {term} in Python ({title})?",
)


@dataclass(frozen=True)
class DocsSplit:
    """Files of questions and answers, JSON lines with ``input`` and ``output``, and their sizes."""

    train_path: Path
    val_path: Path
    num_train: int
    num_val: int


@dataclass(frozen=True)
class _Example:
    topic: str
    question: str
    answer: str


def build_python_docs(output_dir: Path) -> DocsSplit:
    """Write ``train.jsonl`` and ``heldout.jsonl`` with questions on Python and their answers.

    The bytes depend only on the Python version. Whole topics are for validation, and a text that
    several topics contain is used once, so no answer of one file is in the other.
    """
    # Here, since it is half a megabyte of text.
    from pydoc_data.topics import topics

    val_topics = choose_val_topics(topics)
    examples = _make_examples(topics)
    train = [e for e in examples if e.topic not in val_topics]
    val = [e for e in examples if e.topic in val_topics]
    output_dir.mkdir(parents=True, exist_ok=True)
    return DocsSplit(
        train_path=_write_rows(output_dir / "train.jsonl", train),
        val_path=_write_rows(output_dir / "heldout.jsonl", val),
        num_train=len(train),
        num_val=len(val),
    )


def choose_val_topics(topics: Iterable[str]) -> frozenset[str]:
    """Return a tenth of the topics, at least one, the same in every run and on every machine."""
    ordered = sorted(topics, key=_stable_hash)
    return frozenset(ordered[: max(1, round(VAL_FRACTION * len(ordered)))])


def demo_question(split: DocsSplit) -> dict[str, str]:
    """Return the validation example (``input``, ``output``) that best shows what was learnt.

    It is the shortest overview of a topic with a keyword in its title that continues after the
    grammar: a question that needs no context, and an answer whose style shows at a glance.
    """
    lines = split.val_path.read_text(encoding="utf-8").split("\n")
    rows: list[dict[str, str]] = [json.loads(line) for line in lines if line]
    return min(
        rows, key=lambda row: (not _is_keyword_overview(row), len(row["output"]), row["input"])
    )


def _is_keyword_overview(row: Mapping[str, str]) -> bool:
    patterns = (re.escape(q).replace(r"\{title\}", '.*".+".*') for q in _SECTION_QUESTIONS)
    is_topic = any(re.fullmatch(pattern, row["input"]) for pattern in patterns)
    paragraphs = row["output"].split("\n\n")
    return is_topic and len(paragraphs) > 1 and not paragraphs[-1].startswith(" ")


def _make_examples(topics: Mapping[str, str]) -> list[_Example]:
    """Turn topics into examples, each text and each question once."""
    examples: list[_Example] = []
    seen: set[str] = set()
    # Short topics first: long ones ("compound") repeat them ("if", "while") among their sections.
    for topic in sorted(topics, key=lambda name: (len(topics[name]), name)):
        for example in _topic_examples(topic, topics[topic]):
            texts = {p for p in example.answer.split("\n\n") if len(p) >= _SAME_TEXT_CHARS}
            if seen.isdisjoint({*texts, example.question}):
                seen.update(texts, [example.question])
                examples.append(example)
    return examples


def _topic_examples(name: str, text: str) -> list[_Example]:
    topic = parse_topic(text)
    examples = []
    begun: set[tuple[str, str | None]] = set()
    for passage in topic.passages:
        subject = (passage.title, passage.term)
        opening = None if subject in begun else passage.paragraphs[0]
        begun.add(subject)
        for group in _groups(passage.paragraphs):
            answer = "\n\n".join(paragraph.text for paragraph in group)
            ask = _opening_question if group[0] is opening else _detail_question
            question = ask(passage, topic.title, answer)
            if question and len(answer) >= _MIN_ANSWER_CHARS:
                examples.append(_Example(name, question, answer))
    return examples


def _groups(paragraphs: Sequence[Paragraph]) -> list[list[Paragraph]]:
    """Gather consecutive paragraphs up to the longest answer, without splitting a unit."""
    groups: list[list[Paragraph]] = []
    size = _MAX_ANSWER_CHARS
    for unit in _units(paragraphs):
        length = sum(len(p.text) + 2 for p in unit)
        if not unit or size + length > _MAX_ANSWER_CHARS:
            groups.append([])
            size = 0
        groups[-1] += unit
        size += length
    return [group for group in groups if group]


def _units(paragraphs: Sequence[Paragraph]) -> list[list[Paragraph]]:
    """Join code and lists to the prose that introduces them; empty where one is too long."""
    units: list[list[Paragraph]] = []
    for paragraph in paragraphs:
        if paragraph.kind == "prose":
            units.append([paragraph])
        elif units:
            units[-1].append(paragraph)
    return [_shorten(unit) for unit in units]


def _shorten(unit: list[Paragraph]) -> list[Paragraph]:
    if sum(len(p.text) + 2 for p in unit) > _MAX_ANSWER_CHARS:
        unit = unit[:1]
    prose = unit[0].text
    announces_nothing = len(unit) == 1 and prose.endswith(":")
    return [] if announces_nothing or len(prose) + 2 > _MAX_ANSWER_CHARS else unit


def _opening_question(passage: Passage, root: str, answer: str) -> str:
    """Ask for the subject of a section or of a definition."""
    if passage.term is None:
        questions = _SECTION_QUESTIONS if passage.title == root else _SUBSECTION_QUESTIONS
    elif _CALL.fullmatch(passage.term):
        questions = _CALL_QUESTIONS
    elif _DOTTED_NAME.fullmatch(passage.term):
        questions = _NAME_QUESTIONS
    else:
        questions = _TERM_QUESTIONS
    return _pick(questions, answer).format(
        title=_in_sentence(passage.title), root=_in_sentence(root), term=passage.term
    )


def _detail_question(passage: Passage, root: str, answer: str) -> str | None:
    """Ask for a later part, by the code it mentions; None if it mentions none."""
    subject = passage.term or _in_sentence(passage.title)
    if passage.term is None and passage.title != root:
        subject = f"{subject} ({_in_sentence(root)})"
    codes = [code for code in _CODE.findall(answer) if code not in subject]
    codes.sort(key=lambda code: not _HAS_LETTER.search(code))
    return _pick(_DETAIL_QUESTIONS, answer).format(title=subject, code=codes[0]) if codes else None


def _in_sentence(title: str) -> str:
    article, _, rest = title.partition(" ")
    return f"{article.lower()} {rest}" if article in ("The", "A", "An") else title


def _pick(phrasings: Sequence[str], text: str) -> str:
    return phrasings[_stable_hash(text) % len(phrasings)]


def _stable_hash(text: str) -> int:
    # Python's own hash of a string differs from one process to the next.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _write_rows(path: Path, examples: Iterable[_Example]) -> Path:
    rows = ({"input": example.question, "output": example.answer} for example in examples)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes("".join(lines).encode())
    return path
