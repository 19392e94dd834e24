"""The table of base against tuned, through the real `tune` and through main()."""

import json
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from qst_tune.recipes import qst_evaluate

from qst_tune.config.cli import run_recipe
from tests.support.checkpoints import Config, finetune_config, write_config, write_jsonl
from tests.support.directories import side_network_directory
from tests.support.recipe_runs import merged, one_thread, tune_here, val_loss

TUNED = "with the side network"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    (root / "text.txt").write_text("what is the colour of box it is " * 20)
    rows = [
        {"question": f"what is box {i}", "choices": ["it", "is", "of"], "answer": i % 3}
        for i in range(12)
    ]
    write_jsonl(root / "questions.jsonl", rows)
    write_jsonl(root / "examples.jsonl", rows[:2])
    write_jsonl(root / "foreign.jsonl", [{**row, "subject": "law"} for row in rows[:2]])
    return root


@pytest.fixture(scope="module")
def made(root: Path):
    return side_network_directory(root)


@pytest.fixture(scope="module")
def config(root: Path, made) -> Config:
    return {
        **finetune_config(root),
        "side_network": str(made[0]),
        "text": str(root / "text.txt"),
        "questions": str(root / "questions.jsonl"),
        "examples": str(root / "examples.jsonl"),
        "num_examples": 1,
        "window": 16,
    }


def evaluate(config: Config, *overrides: str) -> dict[str, dict[str, float]]:
    with one_thread():
        qst_evaluate.main(merged(config, *overrides))
    return json.loads((Path(config["output_dir"]) / "evaluation.json").read_text())


def test_tune_prints_the_table_that_it_writes(config: Config, root: Path, made) -> None:
    path = write_config(root / "evaluate.yaml", config)
    result = tune_here("run", "qst_evaluate", "--config", path, cwd=root)
    assert result.returncode == 0, result.stderr
    found = json.loads((Path(config["output_dir"]) / "evaluation.json").read_text())
    assert list(found) == ["quantised base model", TUNED]
    table = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in result.stdout.splitlines()
        if line.startswith("|")
    ]
    written = {row[0]: row[1:] for row in table[2:]}
    for name in found[TUNED]:
        assert written[name] == [f"{figures[name]:.4f}" for figures in found.values()]
    # The loss is that of the rows one by one, without our training code.
    expected = val_loss(made[1], root)
    assert found[TUNED]["validation loss"] == pytest.approx(expected, rel=1e-5)
    assert found["quantised base model"]["perplexity"] != found[TUNED]["perplexity"]


def test_batch_sizes_do_not_change_the_scores(config: Config) -> None:
    found = [
        torch.tensor([list(f.values()) for f in evaluate(config, f"batch_size={n}").values()])
        for n in (1, 5)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_packed_rows_have_the_loss_of_the_rows_alone(config: Config, root: Path, made) -> None:
    only = ["text=null", "questions=null", "dataset_val.packed=True"]
    found = evaluate(config, *only)[TUNED]["validation loss"]
    assert found == pytest.approx(val_loss(made[1], root), rel=1e-5)


def test_without_anything_tuned_there_is_one_column(config: Config) -> None:
    both = evaluate(config, "questions=null", "limit=4")
    alone = evaluate({**config, "side_network": None, "questions": None})
    assert alone == {"quantised base model": both["quantised base model"]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["text=null", "questions=null", "dataset_val=null"], "nothing to measure"),
        (["text=absent.txt"], "text=absent.txt cannot be read"),
        (["questions=absent.jsonl"], "absent.jsonl cannot be read"),
        (["examples={root}/foreign.jsonl"], "has none of the subject ''"),
        (["window=0"], "window=0 must be a whole number of at least 1"),
        (["quesions=a"], "did you mean 'questions'?"),
    ],
)
def test_mistake_is_one_helpful_line(
    overrides: list[str],
    message: str,
    config: Config,
    root: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = root / "wrong.yaml"
    OmegaConf.save(OmegaConf.create(config), path)
    given = [text.format(root=root) for text in overrides]
    monkeypatch.setattr(sys, "argv", ["qst_evaluate", "--config", str(path), *given])
    with one_thread(), pytest.raises(SystemExit) as info:
        run_recipe(qst_evaluate.main)
    assert info.value.code == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    assert message in line
