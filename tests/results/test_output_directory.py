"""The output directory is there and writable, or the run does not begin; nothing empty is left."""

from pathlib import Path

import pytest

from qst_tune.errors import UserError
from qst_tune.results.output_directory import output_directory


def fail_in(path: Path, *leave: str) -> None:
    """Fail inside the directory, after making directories (a name with / at its end) and files."""

    def work() -> None:
        with output_directory(path):
            for name in leave:
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).mkdir() if name.endswith("/") else (path / name).touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()


def test_directory_is_made_with_its_parents_and_stays(tmp_path: Path) -> None:
    with output_directory(tmp_path / "a" / "b") as path:
        assert path.is_dir()
        assert list(path.iterdir()) == []
    assert (tmp_path / "a" / "b").is_dir()


def test_failure_removes_what_was_made(tmp_path: Path) -> None:
    fail_in(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_failure_removes_empty_directories_that_components_made(tmp_path: Path) -> None:
    fail_in(tmp_path / "a", "logs/deep/")
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_files(tmp_path: Path) -> None:
    fail_in(tmp_path / "a", "logs/log.txt")
    assert (tmp_path / "a" / "logs" / "log.txt").is_file()


def test_failure_keeps_a_directory_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    fail_in(tmp_path / "a")
    assert (tmp_path / "a").is_dir()


@pytest.mark.parametrize("path", ["file", "file/below", "file/far/below"])
def test_file_in_the_way_is_reported(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(UserError, match=r"output_dir=.* is not writable \(.*\): name another"),
        output_directory(tmp_path / path),
    ):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_directory_half_made_is_removed(tmp_path: Path) -> None:
    too_long = tmp_path / "made" / ("x" * 300)
    with pytest.raises(UserError, match="not writable"), output_directory(too_long):
        pass
    assert list(tmp_path.iterdir()) == []
