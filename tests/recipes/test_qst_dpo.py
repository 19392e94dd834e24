"""What is special to preferences; what holds for every method is in test_methods.py."""

from pathlib import Path

import pytest

from qst_tune.errors import UserError
from tests.support.methods import METHODS

DPO = METHODS["dpo"]


def test_it_learns_which_answer_is_better(tmp_path: Path) -> None:
    run = DPO.run(tmp_path, tmp_path / "run", "epochs=4")
    metrics = run.summary["metrics"]
    assert run.val_loss[0] == pytest.approx(0.6931, abs=1e-4), "no opinion before"
    assert metrics["reward_accuracy"]["16"] == 1.0
    assert metrics["reward_margin"]["16"] > 0
    assert run.val_loss[16] < 0.6


def test_loss_that_takes_no_pairs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not learn from pairs") as error:
        DPO.run(tmp_path, tmp_path / "run", "loss._component_=torch.nn.CrossEntropyLoss")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_classifier_is_refused(tmp_path: Path) -> None:
    model = METHODS["classifier"].config(tmp_path)["model"]
    changes = [f"model.{key}={value}" for key, value in model.items()]
    with pytest.raises(UserError, match="classifies; name a language model"):
        DPO.run(tmp_path, tmp_path / "run", *changes)
