"""Reports a dependency outside the range of our metadata before its change breaks an import."""

from __future__ import annotations

import importlib.metadata
import os
import sys

# Runs with any versions.
SKIP_VARIABLE = "QST_TUNE_SKIP_VERSION_CHECK"


def version_problems() -> list[str]:
    """Return one line for each dependency that is missing or outside its range."""
    from packaging.requirements import Requirement  # here: not of the standard library

    lines = []
    for text in importlib.metadata.requires("qst_tune") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _installed(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            state = f"{requirement.name} {found}" if found else f"no {requirement.name}"
            wanted = f"{requirement.name}{requirement.specifier}"
            lines.append(
                f"{state} is installed, and qst_tune needs {wanted}: pip install '{wanted}' "
                f"({SKIP_VARIABLE}=1 tries it as it is)"
            )
    return lines


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def exit_if_outside() -> None:
    """End with status 2 and a line for each dependency that is outside its range."""
    if os.environ.get(SKIP_VARIABLE):
        return
    problems = version_problems()
    if problems:
        sys.stderr.writelines(f"error: {problem}\n" for problem in problems)
        sys.exit(2)
