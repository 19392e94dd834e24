r"""What a step of several trials takes, beside a step of one run.

    python -m benchmarks.trials --config smollm2/135M_qst --trials 8 --steps 6 --rounds 2

runs the config alone and with so many learning rates by turns, on one thread, and prints the
processor time of their steps; validation, loading and saving are not in it. The config is one of
ours or a file; overrides follow as on the command line.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch

from qst_tune.config.file import parse_config
from qst_tune.training import trainer, trials

CONFIGS = Path(__file__).parent.parent / "configs"


def step_seconds(directory: Path) -> float:
    """Sum the steps' seconds of a run, or of all trials, as their last checkpoints have them."""
    runs = sorted(directory.glob("trials/*")) or [directory]
    states = [max(run.glob("checkpoints/step_*")) / "state.json" for run in runs]
    return sum(float(json.loads(s.read_text())["progress"]["step_seconds"]) for s in states)


def measure(config: Path, overrides: Sequence[str]) -> float:
    """Run a config; returns the processor seconds of its steps."""
    with tempfile.TemporaryDirectory() as directory:
        cfg = parse_config(["--config", str(config), *overrides, f"output_dir={directory}/run"])
        by_processor = mock.Mock(perf_counter=time.process_time)
        with (
            mock.patch.object(trainer, "time", by_processor),
            mock.patch.object(trials, "time", by_processor),
        ):
            import_module("qst_tune.recipes.qst_finetune").main(cfg)  # recipes/, as installed
        return step_seconds(Path(directory, "run"))


def main(arguments: list[str] | None = None) -> None:
    """Print a line a round, and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="smollm2/135M_qst")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    options, overrides = parser.parse_known_args(arguments)
    torch.set_num_threads(1)
    shipped = CONFIGS / f"{options.config}.yaml"
    config = shipped if shipped.is_file() else Path(options.config)
    how = [f"max_steps_per_epoch={options.steps}", "epochs=1", "save_every_n_steps=null"]
    rates = [1e-3 * (1 + number / 2) for number in range(options.trials)]
    many = f"trials.grid.optimizer.lr={rates}"
    ratios = []
    for number in range(options.rounds):
        alone = measure(config, [*how, *overrides])
        together = measure(config, [*how, *overrides, many])
        ratios.append(together / alone)
        print(
            f"round {number + 1}: a run {alone:.2f} s, {options.trials} trials {together:.2f} s, "
            f"{ratios[-1]:.2f} times"
        )
    print(f"median: {statistics.median(ratios):.2f} times the processor time of one run")


if __name__ == "__main__":
    main()
