"""The checkpoints of a run: directories named by step, whole or absent at every moment.

A checkpoint is written aside, flushed to disk and then appears by one rename; it is never changed
or replaced afterwards. ``manifest.json`` in it has the SHA-256 of every file, so that a checkpoint
that was damaged later is recognised and the one before it taken.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from qst_tune.atomic_files import write_directory
from qst_tune.errors import UserError, os_errors

MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint: the step after which it was taken, and its directory."""

    step: int
    directory: Path


class CheckpointStore:
    """The directory ``checkpoints`` of a run, made when the first one is written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def save(self, step: int, files: Mapping[str, bytes]) -> Checkpoint:
        """Write files by path as the checkpoint of a step that has none.

        If it fails, with UserError or at any moment, the checkpoints that were there still load.
        """
        checkpoint = self.checkpoint(step)
        if checkpoint.directory.exists():
            raise UserError(
                f"cannot write {checkpoint.directory}: it exists, and is never replaced"
            )
        write_directory(checkpoint.directory, {**files, MANIFEST_FILE: _manifest(files)})
        return checkpoint

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, complete or damaged, in order."""
        if not self.directory.is_dir():
            return []
        matches = [_NAME.fullmatch(path.name) for path in self.directory.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def checkpoint(self, step: int) -> Checkpoint:
        """Return the checkpoint of a step, not verified."""
        return Checkpoint(step, self.directory / f"step_{step:08}")

    def damage(self, step: int) -> str | None:
        """Return what is wrong with a checkpoint; None if its files are as they were written."""
        directory = self.checkpoint(step).directory
        try:
            digests = json.loads((directory / MANIFEST_FILE).read_text())
            for name, expected in digests.items():
                path = directory / name
                if not path.resolve().is_relative_to(directory.resolve()):
                    return f"{MANIFEST_FILE} names {name}, outside of it"
                if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
                    return f"{name} has changed since it was written"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (OSError, ValueError, AttributeError, TypeError) as error:
            return f"it cannot be read ({error})"
        return None

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest undamaged checkpoint, and what is wrong with each newer one."""
        complaints: list[str] = []
        for step in reversed(self.steps()):
            checkpoint = self.checkpoint(step)
            damage = self.damage(step)
            if damage is None:
                return checkpoint, complaints
            complaints.append(f"{checkpoint.directory} is passed over: {damage}")
        return None, complaints

    def discard_after(self, step: int) -> None:
        """Rename damaged checkpoints after the newest good step; they are kept for their owner."""
        for later in self.steps():
            if later > step:
                path = self.checkpoint(later).directory
                with os_errors(f"rename {path}"):
                    path.rename(_unused(path.with_name(f"damaged_{path.name}")))

    def keep_only(self, steps: Collection[int]) -> None:
        """Delete all other checkpoints, and what interrupted writes have left."""
        for step in set(self.steps()) - set(steps):
            path = self.checkpoint(step).directory
            # Renamed first: a checkpoint that is half deleted must not look like one.
            doomed = path.with_name(f".{path.name}.deleted")
            shutil.rmtree(doomed, ignore_errors=True)
            with os_errors(f"delete {path}"):
                path.rename(doomed)
        for leftover in self.directory.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def set_aside(self) -> Path | None:
        """Rename the directory for a new run to begin with none; None if it has no checkpoint."""
        if not self.steps():
            return None
        renamed = _unused(self.directory.with_name(f"{self.directory.name}_before"))
        with os_errors(f"rename {self.directory}"):
            self.directory.rename(renamed)
        return renamed


def _manifest(files: Mapping[str, bytes]) -> bytes:
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return json.dumps(digests, indent=2).encode()


def _unused(path: Path) -> Path:
    """The path itself, or with the first number that no other file has."""
    candidates = (path.with_name(f"{path.name}_{n}") for n in range(2, 10**6))
    return path if not path.exists() else next(p for p in candidates if not p.exists())
