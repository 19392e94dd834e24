import pytest

from benchmarks.study.dial_page import is_shown_here, sections
from benchmarks.study.methods import METHODS
from benchmarks.study.tasks import STEPS
from tests.benchmarks.study.support import cost, line

TOKENS = STEPS["sst2"]
TIME = METHODS["dial_10"].steps_of_equal_time(TOKENS)
SAVED = METHODS["dial_10_saved"].steps_of_equal_time(TOKENS)


def page(tmp_path, *lines, costs=()):
    return "\n".join(sections(list(lines), list(costs), tmp_path))


def test_equal_tokens_and_equal_time_are_tables_of_each_backbone(tmp_path):
    assert len({TOKENS, TIME, SAVED}) == 3
    text = page(
        tmp_path,
        line("dial_10", 3e-3, 0, 87.0, steps=TOKENS),
        line("dial_10", 3e-3, 1, 86.0, steps=TOKENS),
        line("dial_10", 3e-3, 0, 88.0, steps=TIME),
        line("dial_10", 3e-3, 0, 88.5, steps=SAVED),
        line("dial_10_nf4", 3e-3, 0, 83.0, steps=TOKENS),
        line("qlora", 1e-3, 0, 89.0, steps=TOKENS),
        line("qst", 1e-3, 0, 85.0, steps=TOKENS),
    )
    parts = {part.split("\n")[0]: part for part in text.split("### ")[1:]}
    assert list(parts) == [
        "Equal tokens over 8 bits",
        "The time of checkpointed QLoRA, over 8 bits",
        "The same, activations saved, over 8 bits",
        "Equal tokens over NF4",
    ]
    tokens = parts["Equal tokens over 8 bits"]
    assert "10 of 30 layers | 1.67 | 86.5 (86.0 to 87.0) |" in tokens
    assert "| side network alone (QST) | 1.00 | 85.0 |" in tokens
    assert "| QLoRA, rank 16 | 2.00 | 89.0 |" in tokens
    assert "| 88.0 |" in parts["The time of checkpointed QLoRA, over 8 bits"]
    assert "| 88.5 |" in parts["The same, activations saved, over 8 bits"]
    assert "| 83.0 |" in parts["Equal tokens over NF4"]


def test_there_is_no_section_before_the_dial_was_run(tmp_path):
    assert page(tmp_path, line("qst", 1e-3, 0, 85.0, steps=TOKENS), costs=[cost("qst", 1, 1)]) == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "rows", "shown"), [
    ("dial_3", None, True), ("last_3_nf4", None, True), ("qst", 32, True), ("qst", None, False),
    ("qst_nf4", None, False), ("qlora", None, False),
])  # fmt: skip
def test_the_dial_and_few_rows_are_shown_here_and_all_else_elsewhere(method, rows, shown):
    assert is_shown_here(line(method, 1e-3, 0, 80.0, rows=rows)) == shown


def test_few_rows_show_what_the_first_and_later_epochs_took(tmp_path):
    run = {"steps": 6, "rows": 32, "states": True, "seconds": [9.0, 3.0, 5.0]}
    text = page(tmp_path, line("dial_10", 3e-3, 0, 71.0, **run))
    assert "| sst2 | 32 | 3 | side network and LoRA in the last 10 of 30 layers | 71.0 " in text
    assert "| yes | 9.0 | 4.0 |" in text


def test_the_picture_is_drawn_of_what_was_measured(tmp_path):
    run = line("dial_10", 3e-3, 0, 87.0, steps=TOKENS)
    assert "![" not in page(tmp_path, run)
    text = page(tmp_path, run, costs=[cost("dial_10", 2.0, 300), cost("dial_10_saved", 1.5, 500)])
    assert "![Quality against time and memory](study_dial.png)" in text
    assert (tmp_path / "study_dial.png").stat().st_size > 1000
