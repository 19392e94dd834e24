"""The table of licences is that of what is installed, and has an answer for each package."""

import runpy
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MADE = runpy.run_path(str(ROOT / "docs" / "make_licences.py"))
PINS = (ROOT / "constraints.txt").read_text()


def test_the_page_is_the_one_that_the_command_writes() -> None:
    if f"transformers=={version('transformers')}\n" not in PINS:
        pytest.skip("the page is of the versions of constraints.txt")
    assert MADE["PAGE"].read_text(encoding="utf-8") == MADE["page"]()


def test_every_package_has_a_licence() -> None:
    assert "unknown" not in MADE["page"]()


def test_the_quickstarts_model_has_the_licence_that_is_recorded_with_it() -> None:
    from qst_tune.quickstart import smollm2

    package = smollm2.PACKAGE.partition("==")[0]
    (line,) = [line for line in MADE["HEAD"].splitlines() if smollm2.MODEL_NAME in line]
    assert smollm2._SOURCE["license"] in line
    assert package in line
