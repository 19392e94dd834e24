"""Rows are added to a file of JSON lines, each with its circumstances."""

from pathlib import Path

from benchmarks.gpu.rows import RESULTS, add, circumstances, read


def test_rows_are_added_behind_those_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for number in range(3):
        add(path, {"ms": number})
    assert read(path) == [{"ms": 0}, {"ms": 1}, {"ms": 2}]


def test_circumstances_name_device_versions_day_and_revision() -> None:
    where = circumstances("abc1234")
    assert where["revision"] == "abc1234"
    assert where["versions"]["torchtune"] == "0.6.1"
    assert len(where["date"]) == 10


def test_stored_rows_name_their_device_versions_and_date() -> None:
    for row in read(RESULTS):
        assert {"section", "method", "shape", "device", "torch", "date"} <= set(row)
        assert "error" in row or row["ms"] > 0
