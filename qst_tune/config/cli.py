"""The outermost layer of a recipe: read the config, and turn a user's mistake into one line."""

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune import config

from qst_tune.config.file import lines_of, parse_config, split_arguments
from qst_tune.config.help import help_text
from qst_tune.config.keys import TRAINING_KEYS, Keys
from qst_tune.config.progress_bars import hide_bars_of_small_files
from qst_tune.errors import USER_ERROR_STATUS, ConfigError, UserError, first_line
from qst_tune.terminal import hide_routine_lines, safe_streams

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
TRACEBACK_VARIABLE = "QST_TUNE_TRACEBACK"


def run_recipe(
    recipe_main: Callable[[DictConfig], None], keys: Keys = TRAINING_KEYS, doc: str | None = None
) -> None:
    """Run a recipe's main function on ``--config FILE key=value ...`` and exit.

    A :class:`~qst_tune.errors.UserError` is printed without a traceback (``QST_TUNE_TRACEBACK=1``
    shows it), with exit status 2; any other exception is a defect and keeps its own. ``--help``
    prints the recipe's docstring ``doc`` and its keys.
    """
    hide_routine_lines()
    with safe_streams():
        if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
            sys.stdout.write(help_text(Path(sys.argv[0]).stem, doc or "", keys))
            sys.exit(0)
        _run(recipe_main)


def _run(recipe_main: Callable[[DictConfig], None]) -> None:
    try:
        cfg = parse_config(sys.argv[1:])
        hide_bars_of_small_files(cfg)
        recipe_main(cfg)
    except UserError as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        lines = _with_places(error, sys.argv[1:])
        sys.stderr.writelines(f"error: {line}\n" for line in lines)
        sys.exit(USER_ERROR_STATUS)
    except OSError as error:  # a full disk while logging; checkpoints report their own
        if error.errno not in _DISK_ERRORS or os.environ.get(TRACEBACK_VARIABLE):
            raise
        sys.stderr.write(
            f"error: {error}: make room, then resume with resume_from_checkpoint=True\n"
        )
        sys.exit(USER_ERROR_STATUS)
    except KeyboardInterrupt:
        sys.exit(130)


def instantiate(block: DictConfig, name: str, *args: Any, **kwargs: Any) -> Any:
    """Build a component of the config; UserError with the name of its block if it raises."""
    try:
        return config.instantiate(block, *args, **kwargs)
    except UserError as error:  # of a component of ours
        if re.match(rf"{re.escape(name)}\b", str(error)):
            raise
        raise UserError(f"{name}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {first_line(error)}") from error
    except Exception as error:  # a component may be the user's own code
        # Messages of other types need not be sentences: a KeyError's is the key.
        reason = f"{type(error).__name__}: {first_line(error)}"
        cause = f" ({first_line(error.__cause__)})" if error.__cause__ else ""
        raise UserError(f"{name}: {block._component_} failed: {reason}{cause}") from error


def _with_places(error: UserError, arguments: list[str]) -> list[str]:
    """The message's lines; each mistake of the config file with its line there."""
    if not isinstance(error, ConfigError):
        return str(error).splitlines()
    path, overrides = split_arguments(arguments)
    places = lines_of(path)
    overridden = tuple(text.partition("=")[0] for text in overrides)
    lines = []
    for problem in error.problems:
        line = None if problem.key.startswith(overridden) else places.get(problem.key)
        lines.append(f"config: {problem.text}" + (f" ({path}:{line})" if line else ""))
    return lines
