"""When a run is saved, which checkpoints are kept, and which one the user gets in the end."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import utils

from qst_tune import __version__
from qst_tune.atomic_files import write_directory
from qst_tune.config.keys import TRAINING_KEYS
from qst_tune.data.schedule import Schedule
from qst_tune.distributed.processes import rank_and_world_size, sum_or_fail
from qst_tune.errors import UserError, os_errors
from qst_tune.results.tuned_directory import add_verdict
from qst_tune.training.checkpoint_store import CheckpointStore
from qst_tune.training.method import Method
from qst_tune.training.run_log import RunLog
from qst_tune.training.run_state import Progress
from qst_tune.training.saved_run import CHECKPOINTS_DIRECTORY, FORMAT_VERSION, SavedRun
from qst_tune.training.state_file import pack_state

log = utils.get_logger("INFO")


@dataclass(frozen=True)
class Checkpointing:
    """The checkpoints of one run, each with the method's files and the state of the run.

    Args:
        store (CheckpointStore): where they are.
        header (dict[str, Any]): what every checkpoint records of the run: config, data, versions.
        steps_per_epoch (int): each epoch ends with a checkpoint.
        every (int | None): steps between further ones.
        keep (int | None): how many of the newest are kept besides the best; None keeps all.
    """

    store: CheckpointStore
    header: dict[str, Any]
    steps_per_epoch: int
    every: int | None = None
    keep: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether a step is saved in any case: an epoch's last, and every ``every``-th."""
        return step % self.steps_per_epoch == 0 or bool(self.every and step % self.every == 0)

    def save(
        self,
        method: Method,
        results: dict[str, float],
        state: dict[str, Any],
        progress: Progress,
    ) -> None:
        """Save the run as it is, unless this step is saved already. Collective.

        UserError if it cannot be written, naming what to resume from; SystemExit on the other
        processes.
        """
        error = None
        if rank_and_world_size()[0] == 0 and progress.step not in (0, *self.store.steps()):
            try:
                files = pack_state({**self.header, **state})
                for name, content in method.files({"steps": progress.step, **results}).items():
                    files[f"{method.result_name}/{name}"] = content
                self.store.save(progress.step, files)
                self._prune(progress)
            except UserError as caught:
                error = UserError(f"{caught}; {self._what_is_left()}")
        sum_or_fail(torch.zeros(1), error)

    def export(self, method: Method, progress: Progress, run_log: RunLog) -> None:
        """Write the best result, the last one if none was measured, into the output directory."""
        if rank_and_world_size()[0] != 0 or progress.step == 0:
            return
        step = progress.step if progress.best_step is None else progress.best_step
        files = _read(self.store.checkpoint(step).directory / method.result_name)
        if run_log.summary.verdict:
            files = add_verdict(files, run_log.summary.verdict)
        directory = run_log.directory / method.result_name
        write_directory(directory, files)
        for leftover in directory.parent.glob(f".{directory.name}.*"):  # of a write that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        size = sum(map(len, files.values())) / 1e6
        which = "the last step" if progress.best_step is None else "the best on the validation set"
        if run_log.summary.verdict:
            which = "the best of the validated steps"
        run_log.report(f"{directory}: step {step} of {progress.step}, {which} ({size:.1f} MB)")

    def _prune(self, progress: Progress) -> None:
        if self.keep is not None:
            newest = self.store.steps()[-self.keep :]
            self.store.keep_only({*newest, progress.best_step or progress.step})

    def _what_is_left(self) -> str:
        steps = self.store.steps()
        if not steps:
            return "no checkpoint was written before"
        return (
            f"the last good checkpoint is step {steps[-1]}: make room, then resume with "
            "resume_from_checkpoint=True"
        )


def build_checkpointing(
    cfg: DictConfig, schedule: Schedule, about_run: dict[str, Any], saved: SavedRun | None
) -> Checkpointing:
    """Build the checkpointing of a run in ``output_dir``, and rename checkpoints of another run.

    ``about_run`` is what every checkpoint records of the run besides its config.
    """
    store = CheckpointStore(Path(cfg.output_dir) / CHECKPOINTS_DIRECTORY)
    if rank_and_world_size()[0] == 0:
        _make_way(store, saved)
    name = "keep_last_n_checkpoints"
    keep = cfg.get(name, TRAINING_KEYS[name].default)  # null keeps all
    return Checkpointing(
        store=store,
        header={
            "format_version": FORMAT_VERSION,
            "versions": {"qst_tune": __version__, "torch": torch.__version__},
            "config": OmegaConf.to_container(cfg, resolve=True),
            **about_run,
        },
        steps_per_epoch=schedule.steps_per_epoch,
        every=cfg.get("save_every_n_steps"),
        keep=keep,
    )


def _make_way(store: CheckpointStore, saved: SavedRun | None) -> None:
    """Let no checkpoint of another run, or damaged one, be taken for one of this run."""
    if saved is not None:
        store.discard_after(saved.checkpoint.step)
        return
    renamed = store.set_aside()
    if renamed is not None:
        log.info(
            f"{store.directory} of an earlier run is now {renamed.name}; "
            "resume_from_checkpoint=True would have resumed it"
        )


def _read(directory: Path) -> dict[str, bytes]:
    with os_errors(f"read {directory}"):
        # A link would lead out of the checkpoint; none was written.
        paths = [path for path in sorted(directory.iterdir()) if not path.is_symlink()]
        return {path.name: path.read_bytes() for path in paths}
