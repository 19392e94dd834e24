"""Prints the versions of constraints.txt that CI installs, with the hashes of their files.

``make lock`` writes them to .ci/requirements.txt, for the Python and the platform it runs on: a
file of another hash is refused by ``pip install --require-hashes``. pip's own settings say where
files come from. Needs only the standard library and pip.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
# In constraints.txt, what follows is not installed by CI.
END = "# Of the extras"


def locked_versions(constraints: str) -> dict[str, str]:
    """Return the version of each package of CI, by its name as written."""
    lines = constraints.partition(END)[0].splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def hashes_of(versions: dict[str, str]) -> dict[str, str]:
    """Ask pip which file it would install of each package, and return the files' sha256."""
    requirements = [f"{name}=={version}" for name, version in versions.items()]
    options = ["--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:"]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [sys.executable, "-m", "pip", "install", *options, "--report", str(report)]
        subprocess.run([*command, *requirements], check=True, stdout=sys.stderr)
        installed = json.loads(report.read_text())["install"]
    return {
        _plain(item["metadata"]["name"]): item["download_info"]["archive_info"]["hashes"]["sha256"]
        for item in installed
    }


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Print the lock."""
    versions = locked_versions(CONSTRAINTS.read_text())
    hashes = hashes_of(versions)
    python = ".".join(map(str, sys.version_info[:2]))
    sys.stdout.write(
        f"# What CI installs: Python {python}, {sys.platform}, torch without CUDA.\n"
        "# `make lock` writes this file from constraints.txt.\n"
    )
    for name, version in versions.items():
        sys.stdout.write(f"{name}=={version} --hash=sha256:{hashes[_plain(name)]}\n")


if __name__ == "__main__":
    main()
