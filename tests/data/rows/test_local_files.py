"""Local files are found, taken in order and cut to a split."""

import gzip
from pathlib import Path

import pytest

from qst_tune.data import auto_dataset
from qst_tune.data.rows.local_files import HubRows, find_files, read_local_files
from qst_tune.errors import UserError
from tests.support.rows import write_rows


@pytest.mark.parametrize(
    "name", ["data[v2].jsonl", "what?.jsonl", "star*.jsonl", "a b.jsonl", "#{x}.jsonl"]
)
def test_name_of_an_existing_file_is_no_pattern(name: str, tmp_path: Path) -> None:
    write_rows(tmp_path / name, {"text": "a"})
    assert find_files(str(tmp_path / name)) == [tmp_path / name]


def test_patterns_find_files_in_order_and_each_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / name, {"text": name})
    rows = read_local_files([f"{tmp_path}/**/*.jsonl", f"{tmp_path}/a.jsonl"])
    assert [row["text"] for row in rows] == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert rows.place(1) == f"row 0 of {tmp_path / 'b.jsonl'} (line 1)"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "r.jsonl", {"text": "a"})
    assert find_files("~/r.jsonl") == [tmp_path / "r.jsonl"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("train[80%:]", [8, 9]),
        ("train[:1]+train[9:]", [0, 9]),
    ],
)
def test_split_takes_a_part(split: str, expected: list[int], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", *({"text": str(i)} for i in range(10)))
    rows = read_local_files(path, split=split)
    assert [rows[i]["text"] for i in range(len(rows))] == [str(i) for i in expected]
    assert rows.place(len(rows) - 1).startswith(f"row {list(expected)[-1]} of ")


def test_text_files_may_be_compressed(tmp_path: Path) -> None:
    (tmp_path / "r.csv.gz").write_bytes(gzip.compress(b"text\na\n007\n"))
    rows = read_local_files(str(tmp_path / "r.csv.gz"))
    assert [row["text"] for row in rows] == ["a", "007"]


def test_source_names_the_format_of_an_unusual_ending(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.data", {"text": "a"})
    assert len(read_local_files(path, source="json")) == 1
    with pytest.raises(UserError, match=r"r\.data: its ending is none of \.jsonl, .* source=json"):
        read_local_files(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", r"absent\.jsonl does not exist \(looked from "),
        ("*.csv", r"\*\.csv matches no file"),
        (".", "is a directory: name its files, as in "),
    ],
)
def test_what_is_no_file_is_one_line(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^data_files=.*{message}"):
        read_local_files(name)


def test_unreachable_hub_is_one_line_that_names_local_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        auto_dataset(None, source="somebody/absent-dataset")
    message = str(error.value)
    assert message.startswith("source=somebody/absent-dataset cannot be read from the hub (")
    assert "dataset.data_files=my.jsonl" in message
    assert len(message.splitlines()) == 1


def test_place_names_the_source() -> None:
    rows = HubRows([{"text": "a"}], "somebody/texts, split train")
    assert rows.place(0) == "row 0 of somebody/texts, split train"
    assert rows[0] == {"text": "a"}
