"""No malformed input ends in a traceback; see :mod:`tests.support.malformed`."""

from pathlib import Path

import pytest

from tests.support.attacks import CONTROL, Attack, answer_of, copy_of
from tests.support.malformed import malformed

ALL = malformed()
SAMPLE_EVERY = 12


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(
            attack,
            id=attack.name.encode("unicode_escape").decode(),
            marks=() if number % SAMPLE_EVERY == 0 else pytest.mark.slow,
        )
        for number, attack in enumerate(ALL)
    ],
)
def test_malformed_input_is_a_line_or_allowed(attack: Attack, place: Path, tmp_path: Path) -> None:
    root = copy_of(place, tmp_path / "at")
    attack.change(root)
    before = {path.name for path in root.iterdir()}
    answer = answer_of(attack.command.replace("{root}", str(root)), root, seconds=60)
    shown = f"{attack.name}: {attack.command}\nstatus {answer.status}\n{answer.text[-2000:]}"
    assert "Traceback" not in answer.text, shown
    assert answer.status in (0, 2), shown
    assert not CONTROL.search(answer.err), shown
    assert not (root / "CODE_RAN").exists(), shown
    if answer.status == 2:
        assert answer.errors, shown
        assert {path.name for path in root.iterdir()} - before <= {"cache"}, shown


def test_there_are_two_hundred() -> None:
    assert len({attack.name for attack in ALL}) == len(ALL) >= 200
