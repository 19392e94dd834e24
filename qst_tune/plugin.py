"""Puts our recipes and configs into torchtune's registry, so that the stock ``tune`` knows them.

torchtune 0.6.1 has no hook for that. torch has one: the entry points of the group
``torch.backends`` are called at the end of ``import torch``. Ours, :func:`install`, puts one finder
on ``sys.meta_path``; it waits for three modules of torchtune and changes each right after it was
executed:

- ``torchtune._recipe_registry``: our recipes and configs are appended to its list;
- ``torchtune._cli.run`` and ``torchtune._cli.cp``: a misspelt name of ours gets a hint instead of a
  traceback (see ``cli_hints.py``).

After the third the finder removes itself. Three rules hold, since this file runs in every program
that imports torch:

- it imports only from the standard library, and only what torch has imported already;
- no exception leaves it: a failure becomes a warning, and torchtune is then the stock one;
- ``QST_TUNE_PLUGIN=0`` turns it off.

A program of ours is prepared here as well, since nothing else of ours runs before torchtune imports
torchao: known routine lines are hidden (``terminal.py``), and a dependency that has moved out of
its range ends the program with one line instead of a traceback (``versions.py``).

What it costs, in microseconds, with torch's own line for comparison (autoloading is off because
``-X importtime`` does not see imports made by entry points)::

    TORCH_DEVICE_BACKEND_AUTOLOAD=0 python -X importtime -c "import torch, qst_tune.plugin" 2>&1 |
        grep -E " (torch|qst_tune.*)$"
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# Recipes, recipes/<name>.py, with the methods of their configs, which are the files
# configs/<family>/<size>_<method>.yaml and configs/auto/<method>.yaml. A recipe without methods
# takes the configs of others: torchtune looks a config up among those of all recipes.
_RECIPES: dict[str, tuple[str, ...]] = {
    "qst_finetune": ("qst", "qst_dial", "qst_trials", "qst_sst2", "lst"),
    "qst_dpo": ("qst_dpo",),
    "peqa_finetune": ("peqa_4bit", "peqa_3bit"),
    "peqa_export": (),
    "qst_estimate": (),
    "qst_classify": (),
    "qst_convert": (),
    "qst_generate": ("qst_generate",),
    "qst_evaluate": (),
    "qst_chat": ("qst_chat",),
}
_DISTRIBUTED = ("qst_finetune", "qst_dpo", "peqa_finetune")

# torchtune's own recipes that run on our models, with the configs for that.
_STOCK_RECIPES = {"generate": ("stock_generate",), "eleuther_eval": ("stock_eleuther_eval",)}


def install() -> None:
    """Arrange that torchtune's registry gets our recipes, now or when it is first imported.

    Never raises, except SystemExit in a program of ours. Calling it again changes nothing.
    """
    try:
        if os.environ.get("QST_TUNE_PLUGIN") == "0":
            return
        waiting = {name for name in _PATCHES if not _patch_if_imported(name)}
        installed = any(isinstance(finder, _PatchingFinder) for finder in sys.meta_path)
        if waiting and not installed:
            sys.meta_path.insert(0, _PatchingFinder(waiting))
        if _is_ours(getattr(sys, "argv", [])):
            _prepare()
    except Exception as error:
        report(error)


def report(error: Exception) -> None:
    """Warn of a failure of the plugin without ever raising, not even under ``python -W error``."""
    message = (
        f"qst_tune could not make itself known to torchtune: {error!r}. "
        "Everything else works as without qst_tune; QST_TUNE_PLUGIN=0 silences this."
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        sys.stderr.write(message + "\n")


# A program of ours.


def _is_ours(argv: Sequence[str]) -> bool:
    """Whether this is ``tune run`` of a recipe of ours, its file, or one of our modules."""
    if not argv:
        return False
    program = Path(argv[0])
    is_tune_run = list(argv[1:2]) == ["run"] and not _RECIPES.keys().isdisjoint(argv[2:])
    return is_tune_run or program.stem in _RECIPES or Path(__file__).parent in program.parents


def _prepare() -> None:
    """Hide routine lines of other packages, and end if a dependency is outside its range."""
    from qst_tune import terminal, versions  # here, since other programs do not need them

    terminal.hide_routine_lines()
    versions.exit_if_outside()


# The import hook.


class _PatchingFinder(MetaPathFinder):
    """Finds the modules in ``waiting`` as usual, but has them patched once they are executed."""

    def __init__(self, waiting: set[str]) -> None:
        self._waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders give, whose loader then patches the module."""
        if fullname not in self._waiting:
            return None
        # importlib, too, skips finders that have no find_spec.
        others = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            try:
                self._patch_after(spec.loader)
            except Exception as error:
                report(error)
        return spec

    def _patch_after(self, loader: Any) -> None:
        """Let this one loader patch its module, then forget it; after the last one, leave."""
        execute = loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            del loader.exec_module  # from now on, the class's own
            execute(module)
            _patch(module)
            self._waiting.discard(module.__name__)
            if not self._waiting and self in sys.meta_path:
                sys.meta_path.remove(self)

        loader.exec_module = execute_and_patch


def _patch_if_imported(name: str) -> bool:
    """Patch the module ``name`` if it was imported before us, and return whether it was."""
    module = sys.modules.get(name)
    if module is not None:
        _patch(module)
    return module is not None


def _patch(module: ModuleType) -> None:
    """Apply the patch of ``module``; a failure is only reported."""
    try:
        _PATCHES[module.__name__](module)
    except Exception as error:
        report(error)


# The registry.


def _register(registry: ModuleType) -> None:
    """Append to ``torchtune._recipe_registry`` the recipes and configs it does not have yet."""
    recipes = registry.get_all_recipes()
    known = {recipe.name for recipe in recipes}
    recipes.extend(recipe for recipe in _our_recipes(registry) if recipe.name not in known)
    for recipe in recipes:
        if recipe.name in _STOCK_RECIPES:
            ours = _configs(registry, _directory("qst_tune.configs"), _STOCK_RECIPES[recipe.name])
            have = {config.name for config in recipe.configs}
            recipe.configs.extend(config for config in ours if config.name not in have)


def _our_recipes(registry: ModuleType) -> list[Any]:
    """Return our recipes as torchtune's ``Recipe`` objects, with absolute file paths.

    torchtune joins a file path to the directory of its own recipes, and joining an absolute path to
    anything gives that path.
    """
    recipe_dir, config_dir = _directory("qst_tune.recipes"), _directory("qst_tune.configs")
    return [
        registry.Recipe(
            name=name,
            file_path=str(recipe_dir / f"{name}.py"),
            configs=_configs(registry, config_dir, methods),
            supports_distributed=name in _DISTRIBUTED,
        )
        for name, methods in _RECIPES.items()
    ]


def _configs(registry: ModuleType, config_dir: Path, methods: tuple[str, ...]) -> list[Any]:
    """Return the configs of some methods as torchtune's ``Config`` objects, by name.

    A name is ``<family>/<size>_<method>``; the directory ``auto`` has no sizes, only ``<method>``.
    """
    suffixes = tuple(f"_{method}" for method in methods)
    return [
        registry.Config(
            name=path.relative_to(config_dir).with_suffix("").as_posix(), file_path=str(path)
        )
        for path in sorted(config_dir.glob("*/*.yaml"))
        if f"_{path.stem}".endswith(suffixes)
    ]


def _directory(package: str) -> Path:
    """Return the absolute directory of an installed package without importing the package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"package {package!r} must be installed with qst_tune; reinstall qst_tune with pip"
        )
    return Path(spec.submodule_search_locations[0]).resolve()


def _add_hints(command_module: ModuleType) -> None:
    """Give ``tune run`` or ``tune cp`` hints for misspelt names of ours."""
    from qst_tune import cli_hints  # here, since only the command line needs it

    cli_hints.add_to(command_module, ours=set(_RECIPES))


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "torchtune._recipe_registry": _register,
    "torchtune._cli.run": _add_hints,
    "torchtune._cli.cp": _add_hints,
}
