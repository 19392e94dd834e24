"""The stock `tune` knows our recipes, and nothing of ours can disturb torch or torchtune."""

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torchtune._recipe_registry as registry

from qst_tune import plugin

ROOT = Path(__file__).parent.parent
TUNE = Path(sys.executable).parent / "tune"
RECIPE, CONFIG = "qst_finetune", "smollm2/135M_qst"


def run_tune(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(TUNE), *args],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_python(code: str, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def fresh_registry() -> ModuleType:
    """A second copy of torchtune's registry, as it is before we touch it."""
    spec = importlib.util.spec_from_file_location("fresh_registry", registry.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def waiting_finder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[plugin._PatchingFinder]:
    """The import hook, waiting for a module `to_be_patched` in place of torchtune's."""
    (tmp_path / "to_be_patched.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finder = plugin._PatchingFinder({"to_be_patched"})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    yield finder
    sys.modules.pop("to_be_patched", None)


# Through the real command; `tune ls` and `tune cp` are in test_packaging.py.


def test_switched_off_tune_ls_is_torchtunes_own(tmp_path: Path) -> None:
    result = run_tune("ls", cwd=tmp_path, QST_TUNE_PLUGIN="0")
    assert result.returncode == 0, result.stderr
    assert "lora_finetune_single_device" in result.stdout
    assert "qst" not in result.stdout


def test_misspelt_name_gives_a_hint_and_no_traceback(tmp_path: Path) -> None:
    launch = ("--nproc_per_node", "2", RECIPE, "--config", "smollm2/135M_qts")
    result = run_tune("run", *launch, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("tune run: error: no config ")
    assert f"mean '{CONFIG}'?" in result.stderr
    assert "Traceback" not in result.stderr


# What is registered.


def test_registered_files_exist_and_are_absolute(fresh_registry: ModuleType) -> None:
    recipes = plugin._our_recipes(fresh_registry)
    assert RECIPE in [recipe.name for recipe in recipes]
    paths = [Path(recipe.file_path) for recipe in recipes]
    paths += [Path(config.file_path) for recipe in recipes for config in recipe.configs]
    assert all(path.is_absolute() and path.is_file() for path in paths)


def test_every_config_in_the_tree_belongs_to_exactly_one_recipe(
    fresh_registry: ModuleType,
) -> None:
    stock = {config.name for r in fresh_registry.get_all_recipes() for config in r.configs}
    plugin._register(fresh_registry)
    plugin._register(fresh_registry)  # changes nothing more
    everything = [config.name for r in fresh_registry.get_all_recipes() for config in r.configs]
    registered = sorted(name for name in everything if name not in stock)
    files = (ROOT / "configs").rglob("*.yaml")
    in_tree = sorted(f.relative_to(ROOT / "configs").with_suffix("").as_posix() for f in files)
    assert registered == in_tree


def test_registering_twice_adds_each_recipe_once(fresh_registry: ModuleType) -> None:
    stock = len(fresh_registry.get_all_recipes())
    plugin._register(fresh_registry)
    added = len(fresh_registry.get_all_recipes()) - stock
    plugin._register(fresh_registry)
    assert added == len(plugin._our_recipes(fresh_registry)) > 0
    assert len(fresh_registry.get_all_recipes()) == stock + added


# The import hook.


def test_module_is_patched_after_its_import_and_the_hook_is_gone(
    waiting_finder: plugin._PatchingFinder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_PATCHES", {"to_be_patched": lambda m: setattr(m, "VALUE", 2)})
    module = importlib.import_module("to_be_patched")
    assert module.VALUE == 2
    assert waiting_finder not in sys.meta_path
    assert type(module.__loader__) is type(module.__spec__.loader) is type(plugin.__loader__)
    assert inspect.getsource(module) == "VALUE = 1\n"


def test_spec_looks_like_the_modules_own_to_those_who_only_look(
    waiting_finder: plugin._PatchingFinder,
) -> None:
    spec = importlib.util.find_spec("to_be_patched")
    assert spec.loader.get_source("to_be_patched") == "VALUE = 1\n"
    assert waiting_finder in sys.meta_path


def test_failing_patch_only_warns(
    waiting_finder: plugin._PatchingFinder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_PATCHES", {"to_be_patched": lambda m: m.no_such_name})
    with pytest.warns(RuntimeWarning, match=r"no_such_name.*QST_TUNE_PLUGIN=0"):
        module = importlib.import_module("to_be_patched")
    assert module.VALUE == 1


def test_module_imported_before_us_is_patched_at_once(
    waiting_finder: plugin._PatchingFinder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.meta_path.remove(waiting_finder)
    module = importlib.import_module("to_be_patched")
    monkeypatch.setattr(plugin, "_PATCHES", {"to_be_patched": lambda m: setattr(m, "VALUE", 2)})
    finders = list(sys.meta_path)
    plugin.install()
    assert module.VALUE == 2
    assert sys.meta_path == finders


def test_installing_twice_adds_one_finder(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [f for f in sys.meta_path if not isinstance(f, plugin._PatchingFinder)]
    monkeypatch.setattr(sys, "meta_path", others.copy())
    monkeypatch.setattr(plugin, "_PATCHES", {"not_imported": print})
    plugin.install()
    plugin.install()
    assert len(sys.meta_path) == len(others) + 1


def test_without_torchtune_its_import_fails_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = plugin._PatchingFinder({"absent_torchtune"})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="No module named 'absent_torchtune'"):
        importlib.import_module("absent_torchtune")


# `import torch`, in a process of its own.


def test_import_torch_imports_nothing_but_our_two_small_modules() -> None:
    # Loaded by hand and not by torch, so that "before" can be taken between the two.
    code = """if True:
        import sys, torch
        from importlib.metadata import entry_points
        (ours,) = [e for e in entry_points(group="torch.backends") if e.name == "qst_tune"]
        before = set(sys.modules)
        ours.load()()
        print(sorted(set(sys.modules) - before))
    """
    result = run_python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.stdout.strip() == "['qst_tune', 'qst_tune.plugin']", result.stderr


@pytest.mark.parametrize("options", [(), ("-W", "error::RuntimeWarning")])
def test_failure_of_ours_does_not_break_import_torch(options: tuple[str, ...]) -> None:
    code = """if True:
        from qst_tune import plugin
        plugin._PATCHES = None
        import torch
        print("torch", torch.ones(2).sum().item())
    """
    result = run_python(code, *options)
    assert result.stdout.strip() == "torch 2.0", result.stderr
    assert "qst_tune could not make itself known to torchtune: TypeError" in result.stderr
