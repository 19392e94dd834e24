"""What every attack starts from, and which do not hold yet."""

from pathlib import Path

import pytest

from tests.support.attacks import write_place

# Names of tests, or of their rows, that fail; remove a line with the change that mends it.
STILL_OPEN = set((Path(__file__).parent / "still_open.txt").read_text().splitlines())


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, data, configs and a finished run. Read only: tests attack copies of it."""
    return write_place(tmp_path_factory.mktemp("attacked"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            name, _, row = item.name.partition("[")
            if name in STILL_OPEN or row.removesuffix("]") in STILL_OPEN:
                item.add_marker(pytest.mark.xfail(reason="still open"))
