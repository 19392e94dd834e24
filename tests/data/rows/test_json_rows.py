"""JSON files in all their shapes, and mistakes with their lines."""

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from qst_tune.data.rows import json_rows
from qst_tune.data.rows.json_rows import FileText, read_json_rows
from qst_tune.errors import UserError

ROWS = [{"text": "a\u2028b", "n": {"x": None}}, {"text": "c"}, {"text": "d"}]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
CHAT = {"messages": [{"role": "user", "content": "x"}]}
SHAPES = {
    "lines": "\n".join(LINES),
    "lines with a byte order mark": "\ufeff" + "\n".join(LINES),
    "lines of DOS": "\r\n".join(LINES) + "\r\n",
    "blank lines": "\n\n" + "\n \n".join(LINES) + "\n\n\n",
    "a list": json.dumps(ROWS),
    "a list of several lines": json.dumps(ROWS, indent=2),
    "a list with a row a line": "[" + ",\n".join(LINES) + "]",
    "a list in an object": json.dumps({"version": 1, "data": ROWS}),
    "a list in an object of several lines": json.dumps({"data": ROWS}, indent=1),
}


def rows_of(path: Path, content: str | bytes) -> Any:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_json_rows(FileText(path))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_found_in_every_shape(shape: str, tmp_path: Path) -> None:
    for path, content in (
        (tmp_path / "r.json", SHAPES[shape].encode()),
        (tmp_path / "r.json.gz", gzip.compress(SHAPES[shape].encode())),
    ):
        rows = rows_of(path, content)
        assert [rows[i] for i in range(len(rows))] == ROWS
        assert pickle.loads(pickle.dumps(rows))[1] == ROWS[1], "workers get a copy"


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_one_row_also_when_it_has_a_list(indent: int | None, tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "r.json", json.dumps(CHAT, indent=indent))
    assert [rows[i] for i in range(len(rows))] == [CHAT]


def test_place_is_the_line(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "r.jsonl", SHAPES["blank lines"])
    assert [rows.place(i)[-8:] for i in range(3)] == ["(line 3)", "(line 5)", "(line 7)"]


def test_empty_file_has_no_rows(tmp_path: Path) -> None:
    assert len(rows_of(tmp_path / "r.jsonl", "")) == 0
    assert len(rows_of(tmp_path / "r.json", "[]")) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n{"text": "b"}', "not JSON at column 9: Expecting value"),
        ('{"text": "a"}\n[1]', 'it is a list ([1]), not an object of columns: {"text": "..."}'),
        ('{"text": "a"}\n7', "it is a number (7), not an object"),
        ('{"text": "a"}\n{"text": "a", "text": "b"}', "the key 'text' is there twice"),
        ('{"text": "a"}\n{"text": NaN}', "NaN is no value of JSON"),
        (b'{"text": "a"}\n{"text": "\xe9"}', "not UTF-8 (byte 0xe9 at 10)"),
        ('{"text": "a"}\n{"text": ' + "[" * 10**5, "it is nested too deeply"),
        ('{"text": "a"}\n{"text": "\\ud800"}', r"\ud800 is half a character, which no text has"),
        ('{"text": "a"}\n{"\\uDC00": 1}', r"\uDC00 is half a character"),
        (b'{"text": "a"}\n{"text": "\0"}', "Invalid control character"),
        (b'{"text": "a"}\n\0\0\0', "it is not JSON at column 1"),
        ('{"text": "a"}\n{"text": ' + "1" * 5000 + "}", "Exceeds the limit"),
    ],
)
def test_bad_line_is_found_when_it_is_read(
    content: str | bytes, message: str, tmp_path: Path
) -> None:
    rows = rows_of(tmp_path / "r.jsonl", content)
    assert rows[0] == {"text": "a"}
    with pytest.raises(UserError) as error:
        rows[1]
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text": ', r"r.json is not JSON at line 2, column 11: Expecting"),
        ('{"train": [{"a": 1}], "test": [{"a": 2}]}', r"several lists of rows \(train, test\)"),
        ("\ufeff{}".encode("utf-16"), r"r.json is UTF-16: save it as UTF-8"),
    ],
)
def test_bad_document_is_one_line(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path / "r.json", content)


def test_damaged_gzip_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a whole gzip file"):
        rows_of(tmp_path / "r.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9])


def test_whole_characters_in_escapes_and_escaped_nul_are_text(tmp_path: Path) -> None:
    content = '{"text": "\\ud83d\\ude42 \\\\ud800 \\u0000"}'
    assert rows_of(tmp_path / "r.jsonl", content)[0] == {"text": "\U0001f642 \\ud800 \0"}


def test_deep_nesting_of_a_document_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"r\.json: it is nested too deeply"):
        rows_of(tmp_path / "r.json", '[\n{"a": ' + "[" * 10**5)


def test_many_keys_of_which_the_last_is_there_twice_are_found_in_no_time(tmp_path: Path) -> None:
    keys = ", ".join(f'"{i}": 1' for i in [*range(10**5), 99999])
    with pytest.raises(UserError, match="the key '99999' is there twice"):
        rows_of(tmp_path / "r.jsonl", f"{{{keys}}}\n{{}}")[0]


def test_size_of_a_line_and_of_what_gzip_holds_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "MAX_LINE_BYTES", 2**20)
    monkeypatch.setattr(json_rows, "MAX_GZIP_BYTES", 2**22)
    line = json.dumps({"text": "a" * (2**20 - 13)}) + "\n"
    assert len(rows_of(tmp_path / "r.jsonl", line * 3)) == 3
    with pytest.raises(UserError, match=r"r\.jsonl: line 2 has more than 1 MiB: write one example"):
        rows_of(tmp_path / "r.jsonl", line + " " + line)
    with pytest.raises(UserError, match="has more than 0 GiB inside: unpack it"):
        rows_of(tmp_path / "r.jsonl.gz", gzip.compress(b"\n" * (2**22 + 1)))
