"""Folders are replaced whole or not at all."""

import errno
import os
import stat
from pathlib import Path

import pytest

from qst_tune.errors import UserError
from qst_tune.results.atomic_directory import whole_folder, write_folder

OLD, NEW = {"a": b"old", "b": b"gone"}, {"a": b"new", "c/d": b"nested"}


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_folder_is_replaced_by_exactly_the_new_files(tmp_path: Path) -> None:
    for files in (OLD, NEW):
        write_folder(tmp_path / "x" / "folder", files)
        assert content(tmp_path / "x" / "folder") == files
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["folder"]


def test_permissions_are_those_of_any_folder_the_user_makes(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", OLD)
    (tmp_path / "plain").mkdir()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("folder", "plain")}
    assert len(modes) == 1


@pytest.mark.parametrize("call", ["fsync", "rename 0", "rename 1"])
def test_failed_write_leaves_the_old_folder(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "folder", OLD)
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
        with pytest.raises(UserError, match=r"^cannot write .*folder: No space left on device$"):
            write_folder(tmp_path / "folder", NEW)
    assert content(tmp_path / "folder") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_folder_whose_filling_fails_does_not_appear(tmp_path: Path) -> None:
    def fill_half() -> None:
        with whole_folder(tmp_path / "folder") as new:
            (new / "half").write_text("")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill_half()
    assert not list(tmp_path.iterdir())
