"""What a run prints of its data."""

from array import array
from typing import Any

from qst_tune.data.batches.survey import Survey
from qst_tune.data.batches.survey_report import report

IGNORED = -100


class Letters:
    """Token i is the i-th letter."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        assert not skip_special_tokens
        return "".join(chr(ord("a") + token) for token in tokens)


def survey(**changes: Any) -> Survey:
    row = {"tokens": [0, 1, 2, 3, 4], "labels": [IGNORED, 1, 2, IGNORED, 4]}
    figures = {"labels": array("q", [3, 0]), "num_tokens": 1200, "longest": 700, "first": row}
    return Survey("dataset", "my.jsonl: form text", 64, **{**figures, **changes})


def test_figures_and_the_first_row_with_its_trained_part() -> None:
    assert report(survey(), Letters()).splitlines() == [
        "dataset: my.jsonl: form text",
        "  2 rows, 1,200 tokens (longest row 700), 3 labels to learn (0%)",
        "  the first row; what is learnt is between >>> and <<<:",
        "    a>>>bc<<<d>>>e<<<",
    ]


def test_cut_and_dropped_rows_are_counted() -> None:
    figures = survey(num_cut=1, labels_lost=9, num_dropped=5, reasons=["row 3", "row 4", "row 9"])
    assert report(figures).splitlines()[2:] == [
        "  1 row cut to tokenizer.max_seq_len=64, with them 9 labels",
        "  5 rows dropped (on_bad_row=skip):",
        "    row 3",
        "    row 4",
        "    row 9",
        "    and 2 more",
    ]


def test_preference_shows_both_answers() -> None:
    row = {
        "chosen_input_ids": [0, 1],
        "chosen_labels": [IGNORED, 1],
        "rejected_input_ids": [0, 2],
        "rejected_labels": [IGNORED, 2],
    }
    lines = report(survey(first=row), Letters()).splitlines()
    assert [line.strip() for line in lines[3::2]] == ["a>>>b<<<", "a>>>c<<<"]
    assert ["first row, chosen;" in lines[2], "first row, rejected;" in lines[4]] == [True, True]


def test_class_is_shown_and_long_text_is_shortened() -> None:
    row = {"tokens": [0] * 2000 + [1], "labels": 3}
    lines = report(survey(first=row), Letters()).splitlines()
    assert lines[1] == "  2 rows, 1,200 tokens (longest row 700)"
    assert lines[2] == "  the first row, label 3:"
    assert "[... 1,401 characters ...]" in lines[3]
    assert lines[3].endswith("ab")
    assert len(lines[3]) < 700
