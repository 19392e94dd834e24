"""The keys for readers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qst_tune.config.cli import help_text, markdown_table
from qst_tune.config.keys import RecipeConfig, key, keys_of
from qst_tune.config.schema import TRAINING_KEYS

DOCS = Path(__file__).parents[2] / "docs" / "training.md"


def test_docs_have_the_table_that_the_command_prints() -> None:
    """``python -m qst_tune.config.cli`` prints it."""
    assert markdown_table(TRAINING_KEYS) in DOCS.read_text()


@dataclass(frozen=True, kw_only=True)
class Base(RecipeConfig):
    place: Path = key("where")
    number: int = key("x" * 90, default=5)


@dataclass(frozen=True, kw_only=True)
class Own(Base):
    mode: Literal["a", 2] = key("how", default="a")


def test_help_names_purpose_values_meaning_and_default() -> None:
    """The recipe's own keys come first."""
    assert help_text("do", "Does ``it``.\n", keys_of(Own)).startswith(
        "usage: tune run do --config CONFIG [key=value ...]\n\nDoes `it`.\n\nkeys:\n"
        "  mode: a|2\n      how [default: a]\n  place: path\n      where [required]\n"
    )


def test_a_default_is_never_broken_over_two_lines() -> None:
    assert "\n      [default: 5]\n" in help_text("do", "", keys_of(Own))
