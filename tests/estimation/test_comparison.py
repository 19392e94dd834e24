"""Methods side by side: the order asked for, from one process or several."""

import operator

import pytest

from qst_tune.estimation import comparison

NAMES = ["c", "a", "b"]


def test_several_processes_give_what_one_gives() -> None:
    """Functions of the standard library, so that the processes import nothing of ours."""
    work = operator.methodcaller("upper")
    in_one = dict(comparison._results(work, NAMES[:2]))
    in_several = dict(comparison._results(work, NAMES))
    assert in_one == {"c": "C", "a": "A"}
    assert in_several == {"c": "C", "a": "A", "b": "B"}


def test_an_error_in_another_process_arrives() -> None:
    with pytest.raises(ValueError, match="invalid literal for int"):
        dict(comparison._results(int, NAMES))


def test_rows_are_in_the_order_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked:
        def row(self, name: str) -> tuple[str, None]:
            return name.upper(), None

    monkeypatch.setattr(
        comparison, "_results", lambda work, names: ((n, work(n)) for n in sorted(names))
    )
    rows = comparison.estimate_rows(Asked(), NAMES)
    assert list(rows.items()) == [("c", ("C", None)), ("a", ("A", None)), ("b", ("B", None))]
