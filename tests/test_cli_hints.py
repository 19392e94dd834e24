"""Misspelt names of ours get a hint; torchtune's names and users' files are left alone."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from torchtune._cli import cp, run
from torchtune._cli.tune import TuneCLIParser

from qst_tune import cli_hints, plugin

RECIPE, CONFIG = "qst_finetune", "smollm2/135M_qst"


def check_run(recipe: str, *recipe_args: str) -> str | None:
    args = Namespace(recipe=recipe, recipe_args=list(recipe_args))
    return cli_hints._check_run(args, plugin._RECIPES)


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tune(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    """Run `tune` in this process."""
    monkeypatch.setattr(sys, "argv", ["tune", *argv])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    parser = TuneCLIParser()
    parser.run(parser.parse_args())


@pytest.mark.parametrize(
    "recipe", ["qst_finetun", "qts_finetune", "qst-finetune", "qst_finetune_single_device"]
)
def test_misspelt_recipe_is_recognised(recipe: str) -> None:
    hint = check_run(recipe, "--config", CONFIG)
    assert hint is not None
    assert f"no recipe '{recipe}'; did you mean '{RECIPE}'?" in hint


@pytest.mark.parametrize("config", ["smollm2/135M_qts", "smollm2/135M_qst_single_device"])
def test_misspelt_config_is_recognised(config: str) -> None:
    hint = check_run(RECIPE, "--config", config)
    assert hint is not None
    assert f"no config '{config}'; did you mean '{CONFIG}'?" in hint


def test_missing_config_file_is_named_with_the_directory_searched(tmp_path: Path) -> None:
    hint = check_run(RECIPE, "--config", "mine.yaml")
    assert hint is not None
    assert "no config 'mine.yaml'." in hint
    assert repr(str(tmp_path)) in hint


def test_config_without_a_value_is_said_so() -> None:
    hint = check_run(RECIPE, "--config")
    assert hint is not None
    assert hint.startswith("--config needs a value")


def test_without_a_config_the_next_command_is_named() -> None:
    hint = check_run(RECIPE, "epochs=1")
    assert hint is not None
    assert "`tune run qst_finetune --config auto/qst ...`" in hint
    assert "`tune run qst_finetune --help`" in hint
    assert "write --config auto/qst, with a space" in str(check_run(RECIPE, "--config=auto/qst"))


@pytest.mark.parametrize("arguments", [("--help",), ("--config", CONFIG, "-h"), ("-h", "x=1")])
def test_help_is_the_recipes_own_with_and_without_a_config(
    arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as info:
        tune(monkeypatch, "run", "--nproc_per_node", "2", RECIPE, *arguments)
    assert info.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: tune run qst_finetune --config CONFIG")
    assert "  epochs: whole number\n      passes over the training set [required]\n" in shown


def test_existing_names_and_files_pass(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    assert check_run(RECIPE, "--config", CONFIG, "epochs=1") is None
    assert check_run(RECIPE, "--config", "mine.yaml") is None


@pytest.mark.parametrize(
    "recipe",
    [
        "lora_finetune_single_device",
        "lora_finetune_single_devic",
        "lora_finetune",
        "my/recipe.py",
        "qst_tune/recipes/qst_finetune",
    ],
)
def test_other_recipes_pass_unchecked(recipe: str) -> None:
    assert check_run(recipe, "--config", "no/such_config") is None


@pytest.mark.parametrize("recipe", ["qst_finetune.py", "qst_finetune2", "./qst_finetune.py"])
def test_users_own_file_with_a_name_like_ours_passes(recipe: str, tmp_path: Path) -> None:
    (tmp_path / recipe).with_suffix(".py").touch()
    assert check_run(recipe, "--config", "no/such_config") is None


def test_tune_cp_hints_at_ours_only() -> None:
    hints = {
        name: cli_hints._check_cp(Namespace(file=name), plugin._RECIPES)
        for name in ["qst_finetun", "smollm2/135M_qts", CONFIG, "lora_finetune_single_devic"]
    }
    assert "did you mean 'qst_finetune'?" in str(hints["qst_finetun"])
    assert f"did you mean '{CONFIG}'?" in str(hints["smollm2/135M_qts"])
    assert hints[CONFIG] is hints["lora_finetune_single_devic"] is None


def test_tune_cp_exits_with_the_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune(monkeypatch, "cp", "qst_finetun", ".")
    assert "tune cp: error: no recipe or config 'qst_finetun'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "method"),
    [((), "_run_single_device"), (("--nproc_per_node", "1"), "_run_distributed")],
)
def test_tune_run_still_runs_our_files(
    options: tuple[str, ...], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        run.Run, method, lambda _, args, is_builtin: runs.append((args, is_builtin))
    )
    tune(monkeypatch, "run", *options, RECIPE, "--config", CONFIG, "epochs=1")
    ((args, is_builtin),) = runs
    assert is_builtin
    assert args.recipe.endswith(f"/{RECIPE}.py")
    assert Path(args.recipe_args[1]).is_file()
    assert args.recipe_args[2:] == ["epochs=1"]


def test_failing_check_lets_the_command_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def failing(args: Namespace, ours: Any) -> None:
        raise ZeroDivisionError

    command = cli_hints._with_check(lambda self, args: ran.append(args), failing, ())
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
        command(None, "args")
    assert ran == ["args"]


def test_adding_the_checks_twice_wraps_once() -> None:
    before = cp.Copy._cp_cmd, run.Run._run_cmd
    cli_hints.add_to(cp, ours=plugin._RECIPES)
    cli_hints.add_to(run, ours=plugin._RECIPES)
    assert (cp.Copy._cp_cmd, run.Run._run_cmd) == before
