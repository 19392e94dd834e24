"""Tables come from the stored rows alone, and the pages have those of today's rows."""

from pathlib import Path

import pytest

from benchmarks.gpu.page import PAGES, TABLES, Figures, with_tables
from benchmarks.gpu.rows import EVERY, Row, read
from benchmarks.gpu.turns import NO_TIME


def row(method: str = "QST", **more: object) -> Row:
    base = {"section": "train", "method": method, "shape": "4 x 384", "ms": 100.0, "peak_gib": 4.0}
    return {**base, "device": "NVIDIA H100 80GB HBM3", "torch": "2", "date": "2026-11-27", **more}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_has_the_tables_of_the_stored_rows(page: Path) -> None:
    text = page.read_text()
    assert "<!-- gpu: " in text
    assert text == with_tables(text, read()), "run python -m benchmarks.gpu --page"


def test_the_newest_row_counts_and_an_older_one_shows_its_day() -> None:
    old = row("torchtune QLoRA, checkpointed", ms=575.0, date="2026-11-22")
    first = TABLES["first"](Figures([old, row(ms=204.0), row(ms=163.4)]))
    assert first.splitlines()[-1] == (
        "| 4 x 384 tokens | **163 ms, 4.0 GiB** | 575 ms, 4.0 GiB (11-22) |"
    )


def test_a_figure_of_the_same_day_and_another_revision_shows_its_revision() -> None:
    rows = [row("other", revision="old1234"), row(revision="new1234")]
    figures = Figures(rows)
    assert figures.cell("train", "other", "4 x 384", lambda r: "1 ms") == "1 ms (old1234)"
    assert figures.cell("train", "QST", "4 x 384", lambda r: "1 ms") == "1 ms"


def test_a_method_that_failed_shows_why_and_one_without_time_its_older_figure() -> None:
    rows = [row(ms=204.0), row(error=f"TimeoutError: {NO_TIME}"), row("PEFT", error="x")]
    figures = Figures(rows)
    assert figures.cell("train", "QST", "4 x 384", lambda r: str(r["ms"])) == "204.0"
    failed = row(error="ImportError: No module named 'peft'")
    cell = Figures([*rows, failed]).cell("train", "QST", "4 x 384", lambda r: "?")
    assert cell == "failed: ImportError"


def test_rows_of_another_device_are_not_mixed_in() -> None:
    figures = Figures([row(ms=1.0, device="NVIDIA A100"), row(ms=163.0)])
    assert [r["ms"] for r in figures.section("train")] == [163.0]


def test_text_outside_the_marks_stays() -> None:
    text = "# A\n<!-- gpu: history -->\nold\n<!-- end -->\n\nB\n"
    new = with_tables(text, [row(revision="abc1234")])
    assert new.startswith("# A\n<!-- gpu: history -->\n| tokens | 2026-11-27, abc1234, H100 |\n")
    assert new.endswith("| 4 x 384 | 100 ms, 4.00 GiB |\n<!-- end -->\n\nB\n")
    assert with_tables(new, [row(revision="abc1234")]) == new


def test_a_section_that_failed_as_a_whole_leaves_its_table_as_it_was() -> None:
    rows = [row(), row(EVERY, shape="", error="RuntimeError: x")]
    del rows[1]["ms"]
    assert TABLES["train"](Figures(rows)) == TABLES["train"](Figures(rows[:1]))


def test_every_table_can_be_written_without_rows_of_its_section() -> None:
    figures = Figures([{**row(), "section": "none"}])
    for write in TABLES.values():
        assert write(figures)
