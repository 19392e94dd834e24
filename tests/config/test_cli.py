"""The command line of a recipe: its help, its errors and its exit status."""

import errno
import io
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qst_tune import plugin
from qst_tune.config.cli import run_recipe
from qst_tune.config.components import instantiate
from qst_tune.config.keys import keys_of
from qst_tune.errors import UserError
from tests.support.configs import schema_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("rate: 0.1\n")
    return path


def test_instantiate_builds_and_names_the_block_of_an_error() -> None:
    block = OmegaConf.create({"_component_": "torch.nn.Linear", "in_features": 2})
    assert instantiate(block, "model", out_features=3).weight.shape == (3, 2)
    with pytest.raises(UserError, match=r"^model: .*missing 1 required positional argument"):
        instantiate(block, "model")


def raise_key_error() -> None:
    raise KeyError("LAMA") from OSError(2, "no such thing")


def test_instantiate_says_what_a_bare_error_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "raising", sys.modules[__name__])
    block = OmegaConf.create({"_component_": "raising.raise_key_error"})
    with pytest.raises(UserError) as info:
        instantiate(block, "x")
    reason = "KeyError: 'LAMA' ([Errno 2] no such thing)"
    assert str(info.value) == f"x: raising.raise_key_error failed: {reason}"


def run(recipe, file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(file)])
    return run_recipe(recipe)


def fail_as_user(cfg) -> None:
    raise UserError("one\ntwo")


def test_user_error_is_printed_line_by_line_with_status_2(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as info:
        run(fail_as_user, file, monkeypatch)
    assert info.value.code == 2
    assert capsys.readouterr().err == "error: one\nerror: two\n"


def test_traceback_on_request(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QST_TUNE_TRACEBACK", "1")
    with pytest.raises(UserError, match="one"):
        run(fail_as_user, file, monkeypatch)


def test_defect_keeps_its_traceback(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda cfg: 1 / 0, file, monkeypatch)


def test_full_disk_is_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(cfg) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/logs/x")

    with pytest.raises(SystemExit) as info:
        run(fail, file, monkeypatch)
    assert info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot use /logs/x: No space left on device: make room")


def test_interrupt_is_status_130(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(cfg) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as info:
        run(interrupt, file, monkeypatch)
    assert info.value.code == 130


@pytest.mark.parametrize("recipe", sorted(plugin._RECIPES))
def test_help_of_every_recipe_fits_the_terminal_and_names_every_key(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(f"qst_tune.recipes.{recipe}")
    monkeypatch.setattr(sys, "argv", [f"/x/{recipe}.py", "-h"])
    with pytest.raises(SystemExit) as info:
        run_recipe(module.main, schema_of(module), module.__doc__)
    assert info.value.code == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"usage: tune run {recipe} --config CONFIG [key=value ...]"
    assert max(map(len, shown)) <= 100
    listed = [line.strip().partition(":")[0] for line in shown if re.match(r"  \w+: ", line)]
    assert listed == list(keys_of(schema_of(module)))


def test_a_character_that_stdout_lacks_is_replaced(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    run(lambda cfg: sys.stdout.write("caf\u00e9 \N{GRINNING FACE}"), file, monkeypatch)
    assert written.getvalue() == "caf\u00e9 ?".encode("cp1252")
