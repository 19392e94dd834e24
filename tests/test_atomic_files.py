"""Directories are replaced whole or not at all."""

import errno
import os
import stat
from pathlib import Path

import pytest

from qst_tune.atomic_files import whole_directory, whole_file, write_directory
from qst_tune.errors import UserError

OLD, NEW = {"a": b"old", "b": b"gone"}, {"a": b"new", "c/d": b"nested"}


def content(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_directory_is_replaced_by_exactly_the_new_files(tmp_path: Path) -> None:
    for files in (OLD, NEW):
        write_directory(tmp_path / "x" / "directory", files)
        assert content(tmp_path / "x" / "directory") == files
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["directory"]


def test_permissions_are_those_of_any_directory_the_user_makes(tmp_path: Path) -> None:
    write_directory(tmp_path / "directory", OLD)
    (tmp_path / "plain").mkdir()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("directory", "plain")}
    assert len(modes) == 1


@pytest.mark.parametrize("call", ["fsync", "rename 0", "rename 1"])
def test_failed_write_leaves_the_old_directory(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_directory(tmp_path / "directory", OLD)
    rename, count = Path.rename, iter(range(10))

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail_in_turn(path: Path, target: Path) -> Path:
        return fail() if call.endswith(str(next(count))) else rename(path, target)  # type: ignore

    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, "rename", fail_in_turn)
        with pytest.raises(UserError, match=r"^cannot write .*directory: No space left on device$"):
            write_directory(tmp_path / "directory", NEW)
    assert content(tmp_path / "directory") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


def test_directory_whose_filling_fails_does_not_appear(tmp_path: Path) -> None:
    def fill_half() -> None:
        with whole_directory(tmp_path / "directory") as new:
            (new / "half").write_text("")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill_half()
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for text in ("old", "new"):
        with whole_file(path) as aside:
            aside.write_text(text)
    with pytest.raises(TypeError), whole_file(path) as aside:
        aside.write_text(None)  # type: ignore[arg-type]
    assert content(tmp_path) == {"new/file": b"new"}
