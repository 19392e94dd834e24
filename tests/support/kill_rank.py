"""Kill -9 one of several processes of a sharded run, let the run end, start it again, compare.

Each kill takes a random process at a random moment. The others must end by themselves, and say
why; the second start must end with the same bytes in side_network.safetensors and the same losses
in summary.json as a run that nobody killed. A run that was over before its kill came does not
count. The log of 10 kills is in kill_rank.txt beside this file::

    OMP_NUM_THREADS=1 nice -n 10 python -m tests.support.kill_rank --kills 10
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

from qst_tune.recipes import qst_finetune

from tests.support.checkpoints import colour_rows, finetune_config, write_jsonl
from tests.support.kill_resume import SETTINGS, exit_status, outcome
from tests.support.ranks import rank_environment, run_recipe, unused_port
from tests.support.recipe_runs import merged, one_thread

RANKS = 2
# A process that has lost another must notice within so many seconds.
PATIENCE = 60


def start(root: Path, directory: Path, log: Path) -> list[int]:
    """Fork the processes of a run; returns their ids."""
    config = finetune_config(root) | {"lr_scheduler": {}, "output_dir": str(directory)}
    write_jsonl(root / "train.jsonl", colour_rows(24))
    cfg = merged(config, *SETTINGS, "backbone_sharding=full", "resume_from_checkpoint=True")
    port = unused_port()
    return [_fork(lambda: run_recipe(qst_finetune, cfg), rank, port, log) for rank in range(RANKS)]


def _fork(run: Callable[[], None], rank: int, port: str, log: Path) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        # Python's streams too: under pytest they write elsewhere.
        sys.stdout = sys.stderr = file = log.open("a", buffering=1)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os.environ |= rank_environment(rank, RANKS, port)
        with one_thread():
            run()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        os._exit(status)


def whole_run(root: Path, directory: Path) -> float:
    """Run to the end; returns the seconds it took."""
    begin, log = time.perf_counter(), root / "log.txt"
    statuses = [exit_status(process) for process in start(root, directory, log)]
    assert statuses == [0] * RANKS, log.read_text()[-3000:]
    return time.perf_counter() - begin


def kill_one(root: Path, directory: Path, rank: int, seconds: float) -> str | None:
    """Kill a process after so many seconds, wait for the others and start the run again.

    Returns what was left and how the others ended; None if the run was over before.
    """
    log = root / f"{directory.name}.txt"
    processes = start(root, directory, log)
    time.sleep(seconds)
    if os.waitpid(processes[rank], os.WNOHANG)[0]:  # already over
        for other in set(processes) - {processes[rank]}:
            exit_status(other)
        return None
    os.kill(processes[rank], signal.SIGKILL)
    killed = time.perf_counter()
    statuses = [exit_status(process) for process in processes]
    waited = time.perf_counter() - killed
    assert waited < PATIENCE, f"the others went on for {waited:.0f} s"
    left = sorted(path.name for path in directory.glob("checkpoints/step_*"))
    said = "has lost another process" in log.read_text()
    whole_run(root, directory)
    others = [status for other, status in enumerate(statuses) if other != rank]
    reason = "said why" if said else "before they were joined"
    return f"{left[-1] if left else 'no checkpoint'}; others ended with {others}, {reason}"


def main(kills: int, seed: int, say: Callable[[str], None]) -> int:
    """Kill so many runs; returns how many did not end as they should."""
    moments = random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="kill_rank."))
    whole_run(root, root / "whole")  # also fills the dataset's cache
    duration = whole_run(root, root / "again")
    expected = outcome(root / "whole")
    assert outcome(root / "again") == expected
    done, failures = 0, 0
    for attempt in itertools.count():
        if done == kills:
            break
        rank, seconds = moments.randrange(RANKS), round(moments.uniform(0, duration), 2)
        where = kill_one(root, root / str(attempt), rank, seconds)
        if where is None:
            continue
        done += 1
        same = outcome(root / str(attempt)) == expected
        failures += not same
        verdict = "bit-identical" if same else "DIFFERS"
        say(f"{done:3} process {rank} killed after {seconds} s: {where}: {verdict}")
    say(f"{kills - failures} of {kills} restarted runs are bit-identical to the uninterrupted one")
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(bool(main(arguments.kills, arguments.seed, print)))
