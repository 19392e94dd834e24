"""Hints of ``tune run`` and ``tune cp`` for misspelt recipes and configs of ours, and ``--help``.

torchtune 0.6.1 takes any unknown recipe for a user's module and any unknown config for a user's
file, so a typing error ends in a traceback of ``runpy`` or OmegaConf. Here the names are checked
first: a hint is one line of the command's own error message, with exit status 2. torchtune always
demands ``--config``, so ``tune run RECIPE --help`` is answered here, by the recipe itself.

Only our names are checked, not torchtune's recipes or users' own files and modules. ``plugin.py``
calls :func:`add_to` when torchtune's command line is imported.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from torchtune._recipe_registry import Recipe, get_all_recipes

from qst_tune.errors import nearest, question
from qst_tune.plugin import report

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Collection
    from types import ModuleType

    from torchtune._cli.subcommand import Subcommand

    # The arguments of a command and the names of our recipes, to a hint or None.
    Check: TypeAlias = Callable[[argparse.Namespace, Collection[str]], str | None]
    Method: TypeAlias = Callable[[Subcommand, argparse.Namespace], None]

# difflib's ratio of two names. 0.8 takes one or two wrong letters ("qst_finetun", "qts_finetune")
# and leaves "lora_finetune" (0.72) and "dpo_finetune" (0.75) to torchtune.
_NEAR = 0.8


def add_to(command_module: ModuleType, ours: Collection[str]) -> None:
    """Check the names given to ``tune run`` or ``tune cp`` before it runs.

    Changes the command's class in ``torchtune._cli.run`` or ``torchtune._cli.cp`` in place; a
    second call changes nothing. ``ours`` are the names of our recipes.
    """
    class_name, method_name, check = _CHECKS[command_module.__name__]
    command = getattr(command_module, class_name)
    method = getattr(command, method_name)
    if not hasattr(method, "_checks_names"):
        setattr(command, method_name, _with_check(method, check, ours))


def _with_check(method: Method, check: Check, ours: Collection[str]) -> Method:
    """Wrap a command's method; should ``check`` itself fail, the command runs as without it."""

    @functools.wraps(method)
    def checked(self: Subcommand, args: argparse.Namespace) -> None:
        hint = None
        try:
            hint = check(args, ours)
        except Exception as error:
            report(error)
        if hint is not None:
            self._parser.error(hint)
        method(self, args)

    checked._checks_names = True  # type: ignore[attr-defined]  # marks the method as wrapped
    return checked


def _check_run(args: argparse.Namespace, ours: Collection[str]) -> str | None:
    """Return a hint if ``tune run`` misspells a recipe of ours, or a config for one of ours.

    ``--help`` of a recipe of ours prints its help and exits.
    """
    recipes = {recipe.name: recipe for recipe in get_all_recipes()}
    if args.recipe in recipes and args.recipe not in ours:
        return None
    if args.recipe in recipes:
        recipe = recipes[args.recipe]
        if not {"-h", "--help"}.isdisjoint(args.recipe_args):
            sys.argv = [recipe.file_path, "--help"]
            runpy.run_path(recipe.file_path, run_name="__main__")
        return _check_config(recipe, args.recipe_args)
    near = nearest(args.recipe, recipes, cutoff=_NEAR)
    if near not in ours or _is_users_own(args.recipe):
        return None
    return f"no recipe {args.recipe!r}{question(near)} `tune ls` lists all recipes"


def _check_config(recipe: Recipe, recipe_args: list[str]) -> str | None:
    """Return a hint if the value of ``--config`` is neither a registered config nor a file."""
    names = [config.name for config in recipe.configs]
    if "--config" not in recipe_args:
        # As torchtune does, with what to write.
        written = next((arg for arg in recipe_args if arg.startswith("--config=")), None)
        if written is not None:
            return f"write --config {written.removeprefix('--config=')}, with a space, not '='"
        example = next((name for name in names if name.startswith("auto/")), "CONFIG")
        return (
            f"The '--config' argument is required: `tune run {recipe.name} --config {example} ...`;"
            f" `tune ls` lists the configs, `tune run {recipe.name} --help` the keys"
        )
    values = recipe_args[recipe_args.index("--config") + 1 :]
    if not values:
        return f"--config needs a value: a config of {recipe.name!r} from `tune ls`, or a YAML file"
    registered = [config.name for other in get_all_recipes() for config in other.configs]
    if values[0] in registered or Path(values[0]).is_file():
        return None
    near = nearest(values[0], names, cutoff=_NEAR)
    return (
        f"no config {values[0]!r}{question(near) or '.'} --config takes a "
        f"name from `tune ls` or a YAML file, and {os.getcwd()!r} has no such file"
    )


def _check_cp(args: argparse.Namespace, ours: Collection[str]) -> str | None:
    """Return a hint if ``tune cp`` misspells a recipe or config of ours."""
    # Name of each recipe and config -> the recipe it belongs to.
    owners = {
        name: recipe.name
        for recipe in get_all_recipes()
        for name in (recipe.name, *(config.name for config in recipe.configs))
    }
    near = None if args.file in owners else nearest(args.file, owners, cutoff=_NEAR)
    if near is None or owners[near] not in ours:
        return None
    return f"no recipe or config {args.file!r}{question(near)} `tune ls` lists all of them"


def _is_users_own(recipe: str) -> bool:
    """Whether torchtune would find ``recipe`` as a user's file or module.

    torchtune turns "a/b.py" into the module "a.b" and looks in the working directory last. Only the
    first part is looked up here, which imports nothing.
    """
    first = os.path.splitext(recipe)[0].replace("/", ".").split(".")[0]
    path = [*sys.path, os.getcwd()]
    return Path(recipe).exists() or (bool(first) and PathFinder.find_spec(first, path) is not None)


_CHECKS: dict[str, tuple[str, str, Check]] = {
    "torchtune._cli.run": ("Run", "_run_cmd", _check_run),
    "torchtune._cli.cp": ("Copy", "_cp_cmd", _check_cp),
}
