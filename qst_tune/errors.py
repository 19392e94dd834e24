"""Exceptions for mistakes of the user, and the parts that their messages share."""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from qst_tune.terminal import print_errors, shown

# Exit status of a recipe after a UserError.
USER_ERROR_STATUS = 2
TRACEBACK_VARIABLE = "QST_TUNE_TRACEBACK"


class UserError(ValueError):
    """A wrong config, checkpoint or dataset; its one-line message names value, rule and fix.

    Recipes print the message without a traceback and exit with status 2. Values in it may come from
    files of other people: control characters are spelt out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shown(message))


@dataclass(frozen=True)
class Problem:
    """One mistake of a config."""

    key: str  # dotted path, as in dataset[0].packed; may be empty
    text: str  # one line that names the key and the mistake


class ConfigError(UserError):
    """All mistakes of a config, a line for each."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(f"config: {problem.text}" for problem in problems))
        self.problems = problems


def nearest(name: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the candidate that a misspelt name most likely stands for, or None.

    After those with a letter or two wrong goes one that the name begins with, the longest: of
    "qst_finetune_single_device" it is "qst_finetune", not "lora_finetune_single_device".
    """
    names = list(candidates)
    misspelt = difflib.get_close_matches(name, names, n=1, cutoff=0.9)
    begins = [candidate for candidate in names if name.startswith(f"{candidate}_")]
    alike = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return next(iter([*misspelt, *sorted(begins, key=len, reverse=True), *alike]), None)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the end of a message, or nothing."""
    return question(nearest(name, candidates))


def question(near: str | None) -> str:
    """Return "; did you mean 'x'?" for a known name that is near, or nothing."""
    return f"; did you mean {near!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, else its type."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


@contextmanager
def os_errors(action: str) -> Iterator[None]:
    """Turn an OSError of the block into a UserError: it cannot ``action``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {action}: {error.strerror or error}") from error


def environment_error(error: OSError) -> UserError | None:
    """Return the line for what a disk or its permissions refuse; None if it may be our defect."""
    rules = {
        errno.EACCES: "change its permissions or name another path",
        errno.EPERM: "change its permissions or name another path",
        errno.ENAMETOOLONG: "name a shorter path",
        **dict.fromkeys(
            (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS),
            "make room, then resume with resume_from_checkpoint=True",
        ),
    }
    if error.errno not in rules:
        return None
    path = f" {str(error.filename)[:200]}" if error.filename else ""
    return UserError(f"cannot use{path or ' a file'}: {error.strerror}: {rules[error.errno]}")


@contextmanager
def one_line_errors(
    lines_of: Callable[[UserError], list[str]] = lambda error: str(error).splitlines(),
) -> Iterator[None]:
    """Print a user's mistake of the block without a traceback, and exit with status 2.

    So is what a disk or its permissions refuse, as a full disk while logging; any other exception
    is a defect and keeps its traceback. ``QST_TUNE_TRACEBACK=1`` shows all of them.
    """
    try:
        yield
    except (UserError, OSError) as error:
        known = error if isinstance(error, UserError) else environment_error(error)
        if known is None or os.environ.get(TRACEBACK_VARIABLE):
            raise
        print_errors(lines_of(known))
        sys.exit(USER_ERROR_STATUS)
