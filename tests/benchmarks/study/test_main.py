"""The command line of the study: what it refuses."""

from pathlib import Path

import pytest

from benchmarks.study import __main__ as study


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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rows", "7"], "--rows 7 must be at least the 8 rows of a step"),
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
        {"task": "rte", "rows": None, "device": "cpu"},
        {"task": "rte", "rows": 8, "device": "cuda"},
    ]
