"""Kill -9 runs of qst_finetune at random moments, resume each, compare with a run never stopped.

Every other kill comes after a random time, the others in the middle of a write: before a random one
of the calls that flush or rename a file. Each must end, after one resume, with the same bytes in
side_network.safetensors and the same losses in summary.json. The lock on the output directory and
both caches, of the quantised backbone and of hidden states, are on, and each run begins with caches
of its own, so that kills meet them being written. A run that was over before its kill came does not
count. Runs are forked from this process after its imports, so that one takes
seconds. The log of 50 kills, and of 16 with LoRA, is in kill_resume.txt beside this file::

    OMP_NUM_THREADS=1 nice -n 10 python -m tests.support.kill_resume --kills 50
"""

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qst_tune.recipes import qst_finetune

from tests.support.checkpoints import SIZES, Config, colour_rows, finetune_config, write_jsonl
from tests.support.model_types import tiny_model
from tests.support.recipe_runs import FinetuneResult, merged, one_thread

# Every step and every validation is near a checkpoint, so that many kills meet one being written.
SETTINGS = [
    "epochs=4",
    "batch_size=2",
    "clip_grad_norm=1.0",
    "run_val_every_n_steps=3",
    "save_every_n_steps=2",
    "keep_last_n_checkpoints=2",
    "lr_scheduler._component_=torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "lr_scheduler.num_warmup_steps=3",
]
# A run has 15 checkpoints or more, each of ten flushes and a rename.
NUM_WRITES = 150
DIAL = ["model.lora_layers=1", "model.lora_rank=4", "model.lora_dropout=0.2", "model.dropout=0.1"]
VARIANTS = {
    "shuffled rows, accumulated": ["gradient_accumulation_steps=2"],
    "packed rows, split for validation": ["dataset.packed=True", "~val", "val_fraction=0.25"],
    "LoRA and dropout, accumulated": [
        *DIAL,
        "gradient_accumulation_steps=2",
        "enable_activation_checkpointing=True",
    ],
    "LoRA and dropout, packed rows": [*DIAL, "dataset.packed=True", "~val", "val_fraction=0.25"],
    "three trials, one with LoRA": [
        "trials=[{optimizer.lr: 1e-3}, {seed: 3, model.dropout: 0.1}, {model.lora_layers: 1}]",
        "gradient_accumulation_steps=2",
        "epochs=2",
    ],
}


def config_of(root: Path, variant: str, output_dir: Path, *overrides: str) -> Config:
    """The config of one run."""
    config = finetune_config(root) | {"lr_scheduler": {}, "output_dir": str(output_dir)}
    write_jsonl(root / "train.jsonl", colour_rows(24))
    if not (root / "backbone").exists():
        tiny_model("smollm3", vocab_size=SIZES["vocab_size"]).save_pretrained(root / "backbone")
    settings = VARIANTS[variant]
    if "~val" in settings:
        config["dataset_val"] = None
    kept = [setting for setting in settings if not setting.startswith("~")]
    directory = str(root / "backbone")
    config["model"] = {
        "_component_": "qst_tune.models.qst_from_hf",
        "checkpoint_dir": directory,
        "reduction_factor": 4,
    }
    config["tokenizer"]["path"] = str(root / "model")
    config["checkpointer"] = {
        "_component_": "qst_tune.training.HFCheckpointer",
        "checkpoint_dir": directory,
        "cache_dir": f"{output_dir}.backbone",
    }
    config["hidden_state_cache"] = f"{output_dir}.hidden"
    return merged(config, *SETTINGS, *kept, *overrides)


def start(config: Config, log: Path, *, kill_at_write: int | None = None) -> int:
    """Fork a run, perhaps one that kills itself before its n-th write; returns its process id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if kill_at_write is not None:
            kill_before_write(kill_at_write)
        with one_thread():
            qst_finetune.main(config)
        status = 0
    finally:
        os._exit(status)


def kill_before_write(number: int) -> None:
    """Let the n-th flush or rename of this process be its end."""
    count = itertools.count()

    def or_die(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        return wrapped

    os.fsync = or_die(os.fsync)
    Path.rename = or_die(Path.rename)  # type: ignore[method-assign]
    Path.replace = or_die(Path.replace)  # type: ignore[method-assign]  # as the caches do


def exit_status(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def outcome(directory: Path) -> list[tuple[bytes, dict[str, float], dict[str, float]]]:
    """What must be the same, to the last bit, of a run or of each of its trials."""
    runs = [FinetuneResult(path) for path in sorted(directory.glob("trials/*")) or [directory]]
    return [
        (run.weights_file.read_bytes(), run.summary["train_loss"], run.summary["val_loss"])
        for run in runs
    ]


def uninterrupted(root: Path, variant: str, directory: Path) -> float:
    """Run to the end in a new directory; returns the seconds it took."""
    begin = time.perf_counter()
    process = start(config_of(root, variant, directory), root / "log.txt")
    assert exit_status(process) == 0, (root / "log.txt").read_text()[-3000:]
    return time.perf_counter() - begin


def kill_and_resume(
    root: Path,
    variant: str,
    directory: Path,
    *,
    seconds: float | None = None,
    write: int | None = None,
) -> str | None:
    """Kill a run after so many seconds or writes and resume it.

    Returns where it was killed; None if it was over before.
    """
    process = start(config_of(root, variant, directory), root / "log.txt", kill_at_write=write)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    status = exit_status(process)
    left = sorted(path.name for path in directory.rglob("checkpoints/*"))
    # A busy machine may be told to kill before the lock is taken.
    assert not left or (directory / ".lock").exists() == (status != 0), "held until the end"
    left += sorted(path.name for path in directory.rglob(".side_network*"))
    resume = config_of(root, variant, directory, "resume_from_checkpoint=True")
    resumed = start(resume, root / "log.txt")
    assert exit_status(resumed) == 0, (root / "log.txt").read_text()[-3000:]
    assert not (directory / ".lock").exists()
    if status == 0:
        return None
    assert status == -signal.SIGKILL
    newest = max((name for name in left if name.startswith("step_")), default="no checkpoint")
    hidden = [name for name in left if name.startswith(".")]
    return f"{newest}{', with ' + ', '.join(hidden) if hidden else ''}"


def main(kills: int, seed: int, say: Callable[[str], None]) -> int:
    """Kill so many runs; returns how many did not end as they should."""
    moments = random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="kill_resume."))
    durations = {}
    for name in VARIANTS:
        uninterrupted(root, name, root / name)  # the first run also fills the dataset's cache
        durations[name] = uninterrupted(root, name, root / f"{name}, again")
        assert outcome(root / name) == outcome(root / f"{name}, again")
    done, failures = 0, 0
    for attempt in itertools.count():
        if done == kills:
            break
        variant = list(VARIANTS)[attempt // 2 % len(VARIANTS)]
        if attempt % 2:
            moment: dict[str, Any] = {"write": moments.randrange(NUM_WRITES)}
        else:
            moment = {"seconds": round(moments.uniform(0, durations[variant]), 2)}
        directory = root / str(attempt)
        where = kill_and_resume(root, variant, directory, **moment)
        same = outcome(directory) == outcome(root / variant)
        failures += not same
        if where is not None or not same:
            done += 1
            ((unit, amount),) = moment.items()
            verdict = "bit-identical" if same else "DIFFERS"
            say(f"{done:3} {variant}: killed at {unit} {amount}: {where}: {verdict}")
    say(f"{kills - failures} of {kills} resumed runs are bit-identical to the uninterrupted one")
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(bool(main(arguments.kills, arguments.seed, print)))
