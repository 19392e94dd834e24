"""Every command and Python snippet that README, docs and the heads of configs print."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
_MARK = re.compile(r"<!-- not run: (?P<reason>[^>]+?) -->|# not run: (?P<yaml>.+)")
_COMMAND = re.compile(r"(?:\S*/)?(?:tune|python|pip|make|hf|echo)\s+\S")
_INLINE = re.compile(r"`(?P<code>[^`]+)`(?P<mark>\s*<!-- not run: [^>]+? -->)?")
_SHELL = ("", "sh", "bash", "text", "console")


@dataclass(frozen=True)
class Printed:
    """A command or a snippet of Python, and its place."""

    place: str
    text: str
    not_run: str | None = None
    is_python: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def commands(path: Path) -> list[Printed]:
    """Those of a Markdown file, or of the head of a YAML file, in their order."""
    return [*(_yaml(path) if path.suffix == ".yaml" else _markdown(path))]


def _markdown(path: Path) -> Iterator[Printed]:
    for label, block in _blocks(path):
        if label == "python":
            yield replace(block, is_python=True)
        elif label in _SHELL:
            for line in _joined(block.text.splitlines()):
                if _COMMAND.match(line):
                    yield Printed(block.place, _without_comment(line), block.not_run)
        elif label == "paragraph":
            for found in _INLINE.finditer(block.text):
                code = " ".join(found["code"].split())
                if _COMMAND.match(code):
                    yield Printed(block.place, code, _reason(found["mark"] or ""))


def _yaml(path: Path) -> Iterator[Printed]:
    mark = None
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for line in _joined([line.removeprefix("#").strip() for line in head]):
        mark = _reason(f"# {line}") or mark
        if _COMMAND.match(line):
            yield Printed(_place(path), _without_comment(line), mark)
            mark = None


def _blocks(path: Path) -> Iterator[tuple[str, Printed]]:
    """Fenced and indented blocks by label ("" for indented ones), and paragraphs."""
    lines = path.read_text().splitlines()
    number, mark = 0, None
    while number < len(lines):
        start, line = number, lines[number]
        if line.startswith("```"):
            end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith("```"))
            label, body, number = line.removeprefix("```").strip(), lines[start + 1 : end], end + 1
        elif line.startswith("    "):
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number]):
                number += 1
            label, body = "", [text[4:] for text in lines[start:number]]
        elif line.strip():
            while number < len(lines) and lines[number].strip() and lines[number][:3] != "```":
                number += 1
            label, body = "paragraph", lines[start:number]
        else:
            number += 1
            continue
        text = "\n".join(body)
        yield label, Printed(f"{_place(path)}:{start + 1}", text, mark)
        is_mark = label == "paragraph" and len(body) == 1 and body[0].startswith("<!--")
        mark = _reason(text) if is_mark else None


def _joined(lines: list[str]) -> Iterator[str]:
    """Lines without their continuation."""
    pending = ""
    for line in lines:
        pending = f"{pending} {line.strip()}".strip()
        if pending.endswith("\\"):
            pending = pending[:-1].rstrip()
            continue
        yield pending
        pending = ""


def _without_comment(command: str) -> str:
    return re.split(r"\s+# ", command)[0].strip()


def _reason(text: str) -> str | None:
    found = _MARK.search(text)
    return (found["reason"] or found["yaml"]).strip() if found else None


def _place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
