"""What every attack starts from."""

from pathlib import Path

import pytest

from tests.support.attacks import write_place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, data, configs and a finished run. Read only: tests attack copies of it."""
    return write_place(tmp_path_factory.mktemp("attacked"))
