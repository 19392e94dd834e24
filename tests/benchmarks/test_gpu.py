"""Every section runs in its tiny size on any device, and stores what it prints."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu


@pytest.mark.slow
def test_every_section_prints_and_stores_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "gpu.jsonl"
    gpu.main(["--tiny", "--rounds", "1", "--results", str(results)])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    stored = [json.loads(line) for line in results.read_text().splitlines()]
    shown = [{k: row[k] for k in keys} for row, keys in zip(stored, printed, strict=True)]
    assert shown == printed
    assert {row["section"] for row in stored} == set(gpu.SECTIONS)
    assert all(row["ms"] > 0 and row["device"] and row["date"] for row in stored)
    assert {row["method"] for row in stored if row["section"] == "train"} == {
        "QST",
        "QST, decoded for each part",
        "QST, tables",
        "torchtune QLoRA, checkpointed",
    }


def test_stored_rows_name_their_device_versions_and_date() -> None:
    rows = [json.loads(line) for line in gpu.RESULTS.read_text().splitlines()]
    for row in rows:
        assert {"section", "method", "shape", "ms", "device", "torch", "date"} <= set(row)


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks_gpu.md"])
def test_the_steps_on_a_page_are_the_last_stored_ones(page: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text()
    rows = [json.loads(line) for line in gpu.RESULTS.read_text().splitlines()]
    last = {(row["method"], row["shape"]): row for row in rows if row["section"] == "train"}
    methods = {"QST", "torchtune QLoRA, checkpointed", "PEFT + bitsandbytes QLoRA, checkpointed"}
    for (method, shape), row in last.items():
        if method in methods:
            line = next(line for line in text.splitlines() if line.startswith(f"| {shape}"))
            assert f"{row['ms']:.0f} ms" in line, (method, shape)
