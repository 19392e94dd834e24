"""The command line of the study: what it does with tiny models, and what it refuses."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks.study import __main__ as study
from benchmarks.study.costs import measure
from benchmarks.study.methods import METHODS
from tests.benchmarks.study.support import one_of_two_words, tiny_learner


@pytest.mark.parametrize("missing", ["model", "data"])
def test_what_is_missing_is_said_in_one_line(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing == "data":
        (tmp_path / "tokenizer.json").write_text("{}")
    status = study.main(
        ["--data", str(tmp_path), "--checkpoint", str(tmp_path), "--tasks", "rte", "--threads", "1"]
    )
    said = capsys.readouterr().err
    assert status == 2
    assert said.count("\n") == 1
    assert ("make quickstart" if missing == "model" else "has no directory rte") in said


@pytest.fixture
def there(tmp_path: Path) -> list[str]:
    """Arguments that name a model and data."""
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "rte").mkdir()
    place = ["--data", str(tmp_path), "--checkpoint", str(tmp_path), "--threads", "1"]
    return [*place, "--tasks", "rte", "--results", str(tmp_path / "new.jsonl")]


def test_what_was_run_is_not_run_again_and_the_page_follows(
    there: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "_load", lambda *_: one_of_two_words())
    monkeypatch.setattr(study, "measure_in_new_process", lambda plan: list(measure(plan)))
    for name in ("qst", "dial_10"):
        changes = {"lora_layers": 1} if name == "dial_10" else {}
        build = partial(tiny_learner, **changes)
        monkeypatch.setitem(METHODS, name, replace(METHODS[name], build=build))
    results = Path(there[-1])
    few = ["--rows", "16", "--epochs", "3", "--methods", "dial_10"]
    for arguments, lines in [
        (["--methods", "qst,dial_10", "--steps", "1", "--seeds", "1"], 2),
        (["--methods", "qst,dial_10", "--steps", "1", "--seeds", "2"], 4),
        ([*few, "--seeds", "1", "--states", str(results.parent / "states")], 5),
    ]:
        assert study.main([*there, *arguments]) == 0
        assert len(study.read_results(results)) == lines
    last = study.read_results(results)[-1]
    assert (last["rows"], last["steps"], last["states"], len(last["seconds"])) == (16, 6, True, 3)
    assert study.main([*there, "--methods", "qst,dial_10", "--costs", "1"]) == 0
    costs = study.read_results(results.with_name("new_costs.jsonl"))
    assert [cost["method"] for cost in costs] == ["qst", "dial_10"]
    assert "| rte | 16 | 3 |" in (results.parent / "study.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rows", "7"], "--rows 7 must be at least the 8 rows of a step"),
        (
            ["--unseen-after", "1599"],
            "--unseen-after 1599: a run trains on 1600 rows; give at least so many, without --rows",
        ),
        (["--device", "cuda"], "--device cuda finds no GPU: use --device cpu"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line_before_anything_is_written(
    arguments: list[str],
    told: str,
    there: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert study.main([*there, *arguments]) == 2
    assert capsys.readouterr().err == f"error: {told}\n"
    assert not Path(there[-1]).exists()


def test_an_unknown_method_points_to_the_list(
    there: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        study.main([*there, "--methods", "dial_4"])
    assert error.value.code == 2
    assert "'dial_4' is unknown; --help lists the methods" in capsys.readouterr().err


def test_lines_of_earlier_versions_get_what_they_lack(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    path.write_text('{"task": "rte"}\n{"task": "rte", "rows": 8, "device": "cuda"}\n')
    assert study.read_results(path) == [
        {"task": "rte", "rows": None, "device": "cpu", "threads": 2},
        {"task": "rte", "rows": 8, "device": "cuda", "threads": 2},
    ]
