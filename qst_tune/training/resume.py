"""Find the checkpoint that a run resumes from, and check that its config and data still fit."""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from torchtune import training, utils

from qst_tune.config.record import recorded
from qst_tune.config.schema import TrainingConfig
from qst_tune.data.batches.loader import BatchLoader
from qst_tune.distributed.processes import is_main_process, rank_and_world_size
from qst_tune.errors import UserError
from qst_tune.results.start import Start
from qst_tune.training.checkpoints import CHECKPOINTS_DIRECTORY, FORMAT_VERSION, CheckpointStore
from qst_tune.training.progress import Progress
from qst_tune.training.state_file import State, unpack_state

# Keys that must not change, with the reason. Every other change is logged and accepted.
_FIXED = {
    "model": "the saved tensors belong to that model",
    "tokenizer": "the examples would become other tokens",
    "dataset": "the position in the data would be another",
    "dataset_val": "the best step so far was measured on it",
    "val_fraction": "validation examples would be trained on",
    "collate_fn": "the batches would be others",
    "max_steps_per_epoch": "it decides where an epoch ends",
    "shuffle": "the order of the examples would be another",
    "hidden_state_cache": "the batches would be others",
    "seed": "the order of the examples would be another",
    "data_seed": "the order of the examples would be another",
    "optimizer": "its state, which holds its settings, is the saved one",
    "lr_scheduler": "its state is the saved one",
    "side_network": "the run started from it",
    "scales": "the run started from them",
    "reference": "the losses so far would not be comparable",
    "loss": "the losses so far would not be comparable",
}
# Paths below those keys may change: the content of their files is checked instead.
_MOVABLE = (
    "path",
    "checkpoint_dir",
    "merges_file",
    "data_files",
    "data_dir",
    "source",
    "cache_dir",
)
# What every state has.
_CONTENT = {"config", "data", "seed", "progress", "history", "optimizer", "lr_scheduler"}
_ANEW = "restore that, or start again with another output_dir"
_LARGEST_SEED = 2**32 - 1

log = utils.get_logger("INFO")


@dataclass(frozen=True)
class SavedRun:
    """The newest good checkpoint: its step, its directory, its state from ``unpack_state``."""

    step: int
    directory: Path
    state: State

    @contextmanager
    def read(self) -> Iterator[State]:
        """Yield the state; what it lacks, or has of another type or size, is one UserError."""
        try:
            yield self.state
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"cannot resume from {self.directory}: its state does not fit this run ({reason}); "
                f"{_ANEW}"
            ) from error


def find_saved_run(cfg: TrainingConfig) -> SavedRun | None:
    """Find what ``resume_from_checkpoint=True`` resumes, and log it; None: begin at step 0.

    Processes that torchrun has started again (``--max-restarts``) resume in any case. UserError
    naming every key of the config whose change would break the run.
    """
    is_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if not cfg.resume_from_checkpoint and not is_restarted:
        return None
    store = CheckpointStore(cfg.output_dir / CHECKPOINTS_DIRECTORY)
    step, complaints = store.newest()
    _log(*complaints)
    if step is None:
        _log(f"resuming: no checkpoint in {store.directory}, so the run begins at step 0")
        return None
    saved = SavedRun(step, store.path(step), unpack_state(store.path(step)))
    _check_state(saved)
    _log(f"resuming from {saved.directory}")
    with saved.read() as state:
        _compare(state, cfg)
    return saved


def set_run_seed(cfg: TrainingConfig, saved: SavedRun | None) -> int:
    """Seed all generators, and return the seed, the same on every process.

    ``seed: null`` draws one, or takes the saved run's.
    """
    seed = cfg.seed if saved is None else saved.state["seed"]
    chosen: int = training.set_seed(seed=seed, debug_mode=cfg.cudnn_deterministic_mode)
    if seed is None:
        _log(f"seed={chosen} was drawn: with it the run can be repeated")
    return chosen


def set_run_date(tokenizer: Any, saved: SavedRun | None) -> str | None:
    """Let chat templates write the date of the run's first day, also in a resumed run.

    Returns it in ISO format; None for a tokenizer without dates.
    """
    if not isinstance(getattr(tokenizer, "date", None), datetime):
        return None
    if saved is not None and saved.state.get("date"):
        with saved.read() as state:
            tokenizer.date = datetime.fromisoformat(state["date"])
    return str(tokenizer.date.isoformat())


def describe_data(
    train: BatchLoader,
    validation: BatchLoader | None = None,
    digests: Mapping[str, str] | None = None,
) -> State:
    """Return the number of processes, and of each set of examples their number and digest.

    ``digests`` are of the content of all examples, where they are known; else they are read.
    """
    sets = {
        "training set": train.dataset,
        "validation set": validation.dataset if validation else [],
    }
    digests = digests or {}
    return {
        "processes": rank_and_world_size()[1],
        **{
            name: {"number": len(rows), "digest": digests.get(name) or _digest(rows)}
            for name, rows in sets.items()
        },
    }


def check_same_data(saved: SavedRun, description: State) -> None:
    """Refuse to resume with other data than :func:`describe_data` gave when the run was saved."""
    cannot = f"cannot resume from {saved.directory}"
    for name in ("training set", "validation set"):
        with saved.read() as state:
            before, now = state["data"][name], description[name]
            if before["number"] != now["number"]:
                count = f"{before['number']} examples, this run's {now['number']}"
                raise UserError(f"{cannot}: its {name} has {count}; {_ANEW}")
            if before["digest"] != now["digest"]:
                raise UserError(f"{cannot}: the {name} has changed since it was written; {_ANEW}")


def check_same_start(saved: SavedRun, start: Start | None) -> None:
    """Refuse to resume if the tensors of the directory that the run started from have changed."""
    before = saved.state.get("start")
    if before is not None and start is not None and before != start.digest:
        raise UserError(
            f"cannot resume from {saved.directory}: the tensors of {start.directory}, which it "
            f"started from, have changed since it was written; {_ANEW}"
        )


def _digest(rows: Any) -> str:
    digest = hashlib.sha256()
    for row in (rows[index] for index in range(len(rows))):
        plain = [(key, _plain(row[key])) for key in sorted(row)]
        digest.update(repr(plain).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _check_state(saved: SavedRun) -> None:
    """Refuse the state of another version, or one that no run has written."""
    state, cannot = saved.state, f"cannot resume from {saved.directory}"
    version = state.get("format_version") if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{cannot}: its format is {version}, this qst_tune reads {FORMAT_VERSION}; {_ANEW}"
        )
    missing = sorted(_CONTENT - state.keys())
    if missing:
        raise UserError(f"{cannot}: its state has no {missing[0]!r}")
    if type(state["seed"]) is not int or not 0 <= state["seed"] <= _LARGEST_SEED:
        raise UserError(f"{cannot}: its state has seed={str(state['seed'])[:40]}; {_ANEW}")
    with saved.read():
        step = Progress.from_dict(state["progress"]).step
    if step != saved.step:
        raise UserError(f"{cannot}: its state is of step {step}; {_ANEW}")


def _compare(state: State, cfg: TrainingConfig) -> None:
    before, now = (dict(_flat(config)) for config in (state["config"], recorded(cfg.raw)))
    refused = []
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key) or key == "resume_from_checkpoint":
            continue
        change = f"{key}: {before.get(key)} when saved, {now.get(key)} now"
        reason = _reason_to_refuse(key)
        if key == "hidden_state_cache" and before.get(key) and now.get(key):
            reason = None  # its entries are found by their content
        if reason:
            refused.append(f"cannot resume with {change}: {reason}")
        else:
            _log(f"changed since the checkpoint: {change}")
    refused += _compare_step(state, cfg)
    if refused:
        raise UserError("\n".join(refused))


def _compare_step(state: State, cfg: TrainingConfig) -> list[str]:
    """A step must have as many examples as before, however they are spread."""
    processes = {"saved": state["data"]["processes"], "now": rank_and_world_size()[1]}
    factors = {
        "saved": _step_factors(state["config"]),
        "now": (cfg.batch_size, cfg.gradient_accumulation_steps),
    }
    before, now = ((*factors[when], processes[when]) for when in ("saved", "now"))
    if math.prod(before) != math.prod(now):
        return [
            f"cannot resume with batch_size x gradient_accumulation_steps x processes = "
            f"{' x '.join(map(str, now))} examples a step: it was {' x '.join(map(str, before))} "
            f"when saved, and the position in the data is counted in steps; change one of the "
            f"three so that it is {math.prod(before)} again"
        ]
    if before != now:
        spread = f"{processes['saved']} processes when saved, {processes['now']} now"
        exact = "the run continues as before, except for rounding and the random numbers of dropout"
        _log(f"{spread}: each step has the same examples, so {exact}")
    return []


def _step_factors(config: Any) -> tuple[int, int]:
    """Rows a batch and batches a step, of each process."""
    return config["batch_size"], config.get("gradient_accumulation_steps") or 1


def _reason_to_refuse(key: str) -> str | None:
    if key.rpartition(".")[2].split("[")[0] in _MOVABLE:
        return None
    return _FIXED.get(key.split(".")[0].split("[")[0])


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a nested config with its dotted path."""
    if isinstance(node, dict) and node:
        for key, item in node.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list) and node:
        for index, item in enumerate(node):
            yield from _flat(item, f"{path}[{index}]")
    else:
        yield path, node


def _log(*lines: str) -> None:
    if is_main_process():
        for line in lines:
            log.info(line)
