"""Data that stands beside the repository, in ``../shared``, and is never part of it."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"
AUTHORS_LLAMA = SHARED / "golden" / "llama"
GLUE = SHARED / "data"


def needs(path):
    """A decorator: the marker ``shared``, and a skip that names what is not here."""

    def mark(test):
        skip = pytest.mark.skipif(not path.is_dir(), reason=f"../shared/{path.name} is not here")
        return pytest.mark.shared(skip(test))

    return mark
