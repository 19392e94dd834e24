"""Splits a topic of Python's built-in documentation into passages by the shape of its text.

The texts are Sphinx's plain text output and differ from one Python version to the next, so only
their layout is relied on: underlined titles, blocks between blank lines, and indentation.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

# Sphinx indents code, grammar and the bodies of definitions by three, list items by two.
_INDENT = 3
_UNDERLINE = re.compile(r"([*=\-~^])\1{2,}")
_FOOTNOTES = re.compile(r"-\[ .* \]-")
_LIST_ITEM = re.compile(r"(\*|\d+\.|\([a-z\d]\)) ")
_VERSION_NOTE = re.compile(
    r"(New|Added|Changed|Deprecated)( in| since) version|Deprecated since|See also|Availability:"
)
_FOOTNOTE_MARK = re.compile(r"(?<=[\w.,)]) +\[\d+\](?=[\s.,;)]|$)")
_SENTENCE_START = re.compile(r"[\"'“*(A-Z]")
_SENTENCE_END = re.compile(r"[.:;,?!]\)?$")
_NEXT_SIGNATURE = re.compile(r"(?<=\))\s+(?=[\w.]+\()")

Lines = Sequence[str]
Kind = Literal["prose", "item", "code"]


@dataclass(frozen=True)
class Paragraph:
    """One block between blank lines; hard wraps are joined except in code."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Passage:
    """Consecutive paragraphs below one title, or of one definition."""

    title: str  # of its section
    # what is defined, such as str.count(sub[, start[, end]]); None for running text
    term: str | None
    paragraphs: tuple[Paragraph, ...]


@dataclass(frozen=True)
class Topic:
    """A topic's own title and its passages in their order."""

    title: str
    passages: tuple[Passage, ...]


def parse_topic(text: str) -> Topic:
    """Parse a text of ``pydoc_data.topics``, without tables, version notes and footnotes."""
    sections = list(_sections(text.splitlines()))
    passages: list[Passage] = []
    for title, lines in sections:
        passages += _passages(title, None, _blocks(lines))
    return Topic(sections[0][0] if sections else "", tuple(passages))


def _sections(lines: Lines) -> Iterator[tuple[str, Lines]]:
    """Yield (title, body) for every underlined title."""
    titles = [i for i in range(len(lines) - 1) if _is_title(lines[i], lines[i + 1])]
    footnotes = [i for i, line in enumerate(lines) if _FOOTNOTES.fullmatch(line)]
    ends = [*titles, *footnotes, len(lines)]
    for start in titles:
        end = min(end for end in ends if end > start)
        yield lines[start].strip(), lines[start + 2 : end]


def _is_title(line: str, underline: str) -> bool:
    return bool(
        line.strip() and _UNDERLINE.fullmatch(underline.rstrip()) and len(underline) >= len(line)
    )


def _blocks(lines: Lines) -> list[Lines]:
    """Return the runs of lines between blank lines."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def _passages(title: str, term: str | None, blocks: Sequence[Lines]) -> list[Passage]:
    """Cut blocks at definitions; their bodies become passages of their own, nested ones too."""
    passages: list[Passage] = []
    running: list[Paragraph] = []
    i = 0
    while i < len(blocks):
        head = _definition_head(blocks, i)
        if head is None:
            running += _paragraphs(blocks[i])
            i += 1
            continue
        end = i + 1
        while end < len(blocks) and _indent(blocks[end]) >= _INDENT:
            end += 1
        body = [block for block in (blocks[i][head:], *blocks[i + 1 : end]) if block]
        passages += _passage(title, term, running)
        running = []
        passages += _passages(title, _term(blocks[i][:head]), [_dedent(block) for block in body])
        i = end
    return passages + _passage(title, term, running)


def _passage(title: str, term: str | None, paragraphs: list[Paragraph]) -> list[Passage]:
    return [Passage(title, term, tuple(paragraphs))] if paragraphs else []


def _definition_head(blocks: Sequence[Lines], i: int) -> int | None:
    """Return how many lines of block i name what is defined; None if it is no definition."""
    block = blocks[i]
    if _indent(block) > 0 or _LIST_ITEM.match(block[0]) or block[0].startswith(("+", "|")):
        return None
    if len(block) > 1 and all(_indent([line]) >= _INDENT for line in block[1:]):
        return 1
    is_sentence = bool(_SENTENCE_END.search(block[-1].rstrip()))
    # Prose in the body tells a definition from a sentence that code interrupts.
    has_body = i + 1 < len(blocks) and _indent(blocks[i + 1]) >= _INDENT
    return len(block) if has_body and not is_sentence and _is_prose(blocks[i + 1]) else None


def _is_prose(block: Lines) -> bool:
    start, end = block[0].strip(), block[-1].rstrip()
    return bool(_SENTENCE_START.match(start) and _SENTENCE_END.search(end))


def _term(lines: Lines) -> str:
    """Return what is defined; of many signatures with one description the first three."""
    signatures = _NEXT_SIGNATURE.split(_unwrap(lines))
    return ", ".join(signatures[:3]) + (" and the like" if len(signatures) > 3 else "")


def _paragraphs(block: Lines) -> list[Paragraph]:
    """Return a block as paragraphs: none if it is left out, several if it is a tight list."""
    first = block[0].strip()
    if first.startswith(("+-", "|")) or _VERSION_NOTE.match(first):
        return []
    if _indent(block) >= _INDENT:
        return [Paragraph("code", "\n".join(line.rstrip() for line in block))]
    if _indent(block) > 0:
        return [Paragraph("item", _unwrap(block))]
    starts = [i for i, line in enumerate(block) if _LIST_ITEM.match(line)]
    if not starts or starts[0] > 0:
        return [Paragraph("prose", _unwrap(block))]
    ends = [*starts[1:], len(block)]
    return [
        Paragraph("item", _unwrap(block[start:end]))
        for start, end in zip(starts, ends, strict=True)
    ]


def _unwrap(lines: Lines) -> str:
    text = "\n".join(line.strip() for line in lines)
    # Sphinx wraps "non-virtual" after its hyphen.
    text = re.sub(r"(?<=\w-)\n(?=\w)", "", text)
    return _FOOTNOTE_MARK.sub("", " ".join(text.split()))


def _indent(block: Lines) -> int:
    return len(block[0]) - len(block[0].lstrip())


def _dedent(block: Lines) -> Lines:
    return [line[_INDENT:] for line in block]
