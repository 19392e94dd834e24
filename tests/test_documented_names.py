"""Every file, link and code name in README, CONTRIBUTING and docs exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path
    for directory in ("qst_tune", "recipes", "configs", "tests", "benchmarks")
    for path in (ROOT / directory).rglob("*")
    if path.suffix in (".py", ".yaml", ".txt", ".json", ".jsonl")
]
WORDS = {
    word
    for path in SOURCES
    if path.suffix in (".py", ".yaml") and path != Path(__file__)
    for word in re.findall(r"\w+", path.read_text())
}
# Files that a run writes, the authors' files, and CONTRIBUTING's example of a name.
NOT_OURS = {"recipe_config.yaml", "x.py", "test_x.py", "lm_head_z_path", "pt"}
FILE = re.compile(r"`([\w./-]+\.(?:py|yaml))`")
NAME = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\([^`]*\))?`")

LINK = re.compile(r"\]\(([^)#\s]+)")


def unknown_names(text: str) -> set[str]:
    """Files and identifiers in backquotes that are not in the project."""
    files = {name for name in FILE.findall(text) if Path(name).name not in NOT_OURS}
    absent = {name for name in files if not any(str(path).endswith(name) for path in SOURCES)}
    names = {name for name in NAME.findall(text) if not FILE.match(f"`{name}`")}
    # Only what looks like code: `snake_case` or `CamelCase`, not a word of a file's content.
    code = {name for name in names if re.search(r"_|[a-z][A-Z]|[A-Z]{2}[a-z]", name)}
    return absent | {
        name for name in code if any(part not in WORDS | NOT_OURS for part in name.split("."))
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_code_name_on_a_page_exists(page: Path) -> None:
    assert unknown_names(page.read_text()) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_a_name_that_was_renamed_is_found() -> None:
    text = "`QSTModel`, `QSTModell`, `modules/qst_model.py`, `modules/absent.py`, `a_lost.name()`"
    assert unknown_names(text) == {"QSTModell", "modules/absent.py", "a_lost.name"}
