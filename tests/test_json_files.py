"""A JSON file of a model is an object, absent where that is allowed, or one line."""

import re
from pathlib import Path

import pytest

from qst_tune.errors import UserError
from qst_tune.json_files import read_json


def test_an_object_is_read_and_an_optional_file_may_be_absent(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"b": "\u00e9"}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"b": "\u00e9"}
    assert read_json(tmp_path / "none.json", optional=True) == {}
    with pytest.raises(UserError, match=re.escape("none.json cannot be read: No such file")):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b'{"a": ' + b"[" * 10**5])
def test_another_content_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    for optional in (False, True):
        with pytest.raises(UserError, match=r"a\.json is not valid JSON: "):
            read_json(tmp_path / "a.json", optional=optional)


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**36)  # sparse
    with pytest.raises(UserError, match="is not valid JSON: more than 64 MiB"):
        read_json(tmp_path / "a.json")
