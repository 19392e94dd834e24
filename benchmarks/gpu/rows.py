"""The file of measurements: a JSON object a line, added to and never changed."""

import json
import subprocess
from collections.abc import Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results" / "gpu.jsonl"
EVERY = "every method"  # of a section that failed as a whole
PACKAGES = (
    "triton",
    "torchtune",
    "torchao",
    "transformers",
    "peft",
    "bitsandbytes",
    "liger-kernel",
)


def read(path: Path = RESULTS) -> list[Row]:
    """Read all rows, the oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def add(path: Path, row: Row) -> None:
    """Add a row."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def newest(rows: Iterable[Row]) -> dict[tuple[str, str, str], Row]:
    """Return the last row of each section, method and shape."""
    return {(row["section"], row["method"], row["shape"]): row for row in rows}


def circumstances(revision: str | None) -> Row:
    """Name device, versions, day and revision of the code."""
    is_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if is_gpu else "cpu",
        "torch": torch.__version__,
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "date": date.today().isoformat(),
        "revision": revision or _revision(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    command = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
