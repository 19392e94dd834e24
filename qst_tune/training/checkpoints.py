"""The checkpoints of a run: states to resume from, whole or absent at every moment.

A checkpoint is a directory named by its step. It is written aside, flushed to disk and then appears
by one rename; it is never changed or replaced afterwards. Its ``manifest.json`` has the SHA-256 of
every file, so that a checkpoint that was damaged later is recognised and another one taken. Damaged
ones are renamed ``damaged_*`` and never deleted.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qst_tune.atomic_files import write_directory
from qst_tune.distributed.processes import is_main_process, sum_or_fail
from qst_tune.errors import UserError, os_errors
from qst_tune.results.tuned_directory import RECIPE_CONFIG, add_verdict
from qst_tune.training.methods import Method
from qst_tune.training.monitor import Monitor
from qst_tune.training.progress import Progress
from qst_tune.training.run_log import RunLog
from qst_tune.training.state_file import State, pack_state

CHECKPOINTS_DIRECTORY = "checkpoints"
FORMAT_VERSION = 4  # 1 had no digest of the validation set, 2 and 3 one of 16 rows
MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"step_(\d{8})")


class CheckpointStore:
    """The directory ``checkpoints`` of a run, made when the first one is written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._run = _inode(directory.parent)

    def path(self, step: int) -> Path:
        """Return the directory of a step's checkpoint, which need not exist."""
        return self.directory / f"step_{step:08}"

    def save(self, step: int, files: Mapping[str, bytes]) -> None:
        """Write files by path as the checkpoint of a step that has none.

        If it fails, with UserError or at any moment, the checkpoints that were there still load.
        """
        path = self.path(step)
        if path.exists():
            raise UserError(f"cannot write {path}: it exists, and is never replaced")
        run = self.directory.parent
        if _inode(run) != self._run:  # writing would make it anew, or go into another run's
            raise UserError(f"cannot write {path}: {run} was removed while the run went on")
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        manifest = json.dumps(digests, indent=2).encode()
        write_directory(path, {**files, MANIFEST_FILE: manifest}, private=files)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, complete or damaged, in order."""
        if not self.directory.is_dir():
            return []
        with os_errors(f"read {self.directory}"):
            matches = [_NAME.fullmatch(path.name) for path in self.directory.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def damage(self, step: int) -> str | None:
        """Return what is wrong with a checkpoint; None if its files are as they were written."""
        directory = self.path(step)
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

    def newest(self) -> tuple[int | None, list[str]]:
        """Return the newest step that is undamaged, and what is wrong with each newer one."""
        complaints: list[str] = []
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if damage is None:
                return step, complaints
            complaints.append(f"{self.path(step)} is passed over: {damage}")
        return None, complaints

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, which is kept for its owner; returns its new path."""
        path = self.path(step)
        renamed = _unused(path.with_name(f"damaged_{path.name}"))
        with os_errors(f"rename {path}"):
            path.rename(renamed)
        return renamed

    def set_all_aside(self) -> Path | None:
        """Rename the directory for a new run to begin with none; None if it has no checkpoint."""
        if not self.steps():
            return None
        renamed = _unused(self.directory.with_name(f"{self.directory.name}_before"))
        with os_errors(f"rename {self.directory}"):
            self.directory.rename(renamed)
        return renamed

    def keep_only(self, steps: Collection[int]) -> None:
        """Delete all other checkpoints, and what interrupted writes have left."""
        for step in set(self.steps()) - set(steps):
            path = self.path(step)
            # Renamed first: a checkpoint that is half deleted must not look like one.
            doomed = path.with_name(f".{path.name}.deleted")
            shutil.rmtree(doomed, ignore_errors=True)
            with os_errors(f"delete {path}"):
                path.rename(doomed)
        for leftover in self.directory.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)


@dataclass(frozen=True)
class Checkpointing:
    """When a run is saved, which checkpoints are kept, and which one the user gets in the end."""

    store: CheckpointStore  # where they are
    header: State  # what every checkpoint records of the run: config, data, versions
    steps_per_epoch: int  # each epoch ends with a checkpoint
    every: int | None = None  # steps between further ones
    keep: int | None = None  # how many of the newest are kept besides the best; None keeps all

    def is_due(self, step: int) -> bool:
        """Whether a step is saved in any case: an epoch's last, and every ``every``-th."""
        return step % self.steps_per_epoch == 0 or bool(self.every and step % self.every == 0)

    def save(
        self,
        method: Method,
        results: dict[str, float],
        state: State,
        progress: Progress,
    ) -> None:
        """Save the run as it is, unless this step is saved already. Collective.

        UserError if it cannot be written, naming what to resume from; SystemExit on the other
        processes.
        """
        error = None
        if is_main_process() and progress.step not in (0, *self.store.steps()):
            try:
                files = pack_state({**self.header, **state})
                for name, content in method.files({"steps": progress.step, **results}).items():
                    files[f"{method.result_name}/{name}"] = content
                self.store.save(progress.step, files)
                if self.keep is not None:
                    newest = self.store.steps()[-self.keep :]
                    self.store.keep_only({*newest, progress.best_step or progress.step})
            except UserError as caught:
                error = UserError(f"{caught}; {self._what_is_left()}")
        sum_or_fail(torch.zeros(1), error)

    def replace_damaged_best(
        self, progress: Progress, figures: Mapping[int, float], monitor: Monitor
    ) -> list[str]:
        """Set a damaged best checkpoint aside and let the next best step take its place.

        ``figures`` are those of all validated steps; of these the best one counts that has a
        checkpoint without damage. Changes ``progress``; returns what a user must know of it.
        """
        notes = []
        while (lost := progress.best_step) is not None:
            damage = self.store.damage(lost)
            if damage is None:
                break
            where = (
                f" and is now {self.store.set_aside(lost)}"
                if self.store.path(lost).exists()
                else ""
            )
            stored = [s for s in self.store.steps() if s in figures and s <= progress.step]
            best = min(stored, key=lambda s: (monitor.rank(figures[s]), s), default=None)
            progress.best_step, progress.best_value = best, None if best is None else figures[best]
            progress.validations_since_best = sum(s > best for s in figures) if best else 0
            instead = (
                f"step {best} is the next best" if best else "no other validated step was kept"
            )
            notes.append(
                f"warning: the checkpoint of step {lost}, the best so far, is damaged ({damage})"
                f"{where}; {instead}"
            )
        return notes

    def export(self, method: Method, progress: Progress, run_log: RunLog, *, which: str) -> None:
        """Write a step's result into the output directory, ``which`` for people.

        That is the best step, or the newest one if no step was validated. UserError if its
        checkpoint is damaged.
        """
        step = progress.step if progress.best_step is None else progress.best_step
        damage = self.store.damage(step)
        if damage:
            raise UserError(
                f"cannot write the result: {self.store.path(step)} is damaged ({damage})"
            )
        files = method.with_other_formats(_read(self.store.path(step) / method.result_name))
        if run_log.summary.verdict:
            files = add_verdict(files, run_log.summary.verdict)
        directory = run_log.directory / method.result_name
        write_directory(directory, files, private=[RECIPE_CONFIG])
        for leftover in directory.parent.glob(f".{directory.name}.*"):  # of a write that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        size = sum(map(len, files.values())) / 1e6
        run_log.report(f"{directory}: step {step} of {progress.step}, {which} ({size:.1f} MB)")

    def _what_is_left(self) -> str:
        steps = self.store.steps()
        if not steps:
            return "no checkpoint was written before"
        return (
            f"the last good checkpoint is step {steps[-1]}: make room, then resume with "
            "resume_from_checkpoint=True"
        )


def _read(directory: Path) -> dict[str, bytes]:
    with os_errors(f"read {directory}"):
        # A link would lead out of the checkpoint; none was written.
        paths = [path for path in sorted(directory.iterdir()) if not path.is_symlink()]
        return {path.name: path.read_bytes() for path in paths}


def _unused(path: Path) -> Path:
    """The path itself, or with the first number that no other file has."""
    candidates = (path.with_name(f"{path.name}_{n}") for n in range(2, 10**6))
    return path if not path.exists() else next(p for p in candidates if not p.exists())


def _inode(directory: Path) -> int | None:
    return directory.stat().st_ino if directory.is_dir() else None
