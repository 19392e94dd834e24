"""The keys for readers."""

from pathlib import Path

from qst_tune.config.help import help_text, markdown_table
from qst_tune.config.keys import TRAINING_KEYS, Key

DOCS = Path(__file__).parents[2] / "docs" / "training.md"


def test_docs_have_the_table_that_the_command_prints() -> None:
    """``python -m qst_tune.config.help`` prints it."""
    assert markdown_table(TRAINING_KEYS) in DOCS.read_text()


def test_help_names_purpose_values_meaning_and_default() -> None:
    keys = {
        "mode": Key(kind=str, choices=("a", 2), default="a", meaning="how"),
        "place": Key(kind=Path, required=True, meaning="where"),
    }
    assert help_text("do", "Does ``it``.\n", keys).startswith(
        "usage: tune run do --config CONFIG [key=value ...]\n\nDoes `it`.\n\nkeys:\n"
        "  mode: a|2\n      how [default: a]\n  place: path\n      where [required]\n"
    )


def test_a_default_is_never_broken_over_two_lines() -> None:
    keys = {"key": Key(kind=int, meaning="x" * 90, default=5)}
    assert "\n      [default: 5]\n" in help_text("do", "", keys)
