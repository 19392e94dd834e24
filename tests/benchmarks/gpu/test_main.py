"""Every section runs in its tiny size on any device, and stores what it prints."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import peers
from benchmarks.gpu.methods import DIAL, QST
from benchmarks.gpu.unsloth import UNSLOTH

PACKAGES = {
    peers.PEFT: ("peft", "bitsandbytes"),
    UNSLOTH: ("unsloth",),
    peers.PEFT_LIGER: ("peft", "bitsandbytes", "liger_kernel"),
}


@pytest.mark.slow
def test_every_section_prints_and_stores_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "gpu.jsonl"
    assert gpu.main(["--tiny", "--rounds", "1", "--results", str(results)]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    where, *rows = printed
    stored = [json.loads(line) for line in results.read_text().splitlines()]
    assert stored == [{**row, **where} for row in rows]
    assert where["device"]
    assert where["date"]
    sections = [*dict.fromkeys(row["section"] for row in rows)]
    assert {*gpu.SECTIONS} - {*sections} == {"compiled", "unsloth"}  # their rows are of "train"
    assert all(("error" in row) or row["ms"] > 0 for row in rows)
    times = {(row["section"], row["method"]): row.get("ms") for row in rows}
    for key in (
        ("train", QST),
        ("train", peers.TORCHTUNE_COMPILED),
        *(("dial", name) for name in DIAL),
        ("long", QST),
    ):
        assert times[key], key
    errors = {row["method"]: row["error"] for row in rows if "error" in row}
    for method, packages in PACKAGES.items():
        if not all(map(find_spec, packages)):
            assert "No module named" in errors[method]
    ours = {row["method"] for row in rows if "error" not in row}
    assert {"decode NF4", "LinearCrossEntropyLoss", "with the side network"} <= ours


def test_a_section_that_does_not_exist_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gpu.main(["--tiny", "--sections", "train,trian"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "trian" in line
    assert "generate" in line


def test_a_section_that_fails_gives_a_row_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(bench: object) -> list[dict[str, object]]:
        raise RuntimeError("no\nkernel")

    def works(bench: object) -> list[dict[str, object]]:
        return [{"section": "b", "method": "m", "shape": "1 x 1", "ms": 1.0}]

    monkeypatch.setattr(gpu, "SECTIONS", {"a": (fails, 1), "b": (works, 1)})
    results = tmp_path / "rows.jsonl"
    gpu.main(["--tiny", "--sections", "a,b", "--results", str(results)])
    first, second = [json.loads(line) for line in results.read_text().splitlines()]
    assert first["error"] == "RuntimeError: no kernel"
    assert second["ms"] == 1.0
