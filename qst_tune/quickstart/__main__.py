"""Fine-tune a real model on real data in minutes: ``python -m qst_tune.quickstart``.

The stock ``tune`` command does the work; each command is printed before it runs.
"""

import argparse
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from qst_tune.errors import one_line_errors
from qst_tune.quickstart.python_docs import build_python_docs, demo_question
from qst_tune.quickstart.smollm2 import default_cache_dir, fetch_smollm2
from qst_tune.terminal import safe_streams

TRAIN_CONFIG = "smollm2/135M_qst"
GENERATE_CONFIG = "smollm2/135M_qst_generate"


def main() -> int:
    """Prepare model and data, train, and show what changed; return the exit status."""
    arguments = _parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fetch_smollm2()
    split = build_python_docs(default_cache_dir() / "python_docs")
    print(
        f"data: {split.num_train} training examples and {split.num_val} for validation, in "
        f"{split.train_path.parent}"
    )
    if arguments.prepare_only:
        return 0
    output_dir = default_cache_dir() / "runs" / "135M_qst"
    train = ["run", "qst_finetune", "--config", TRAIN_CONFIG, *arguments.overrides]
    question = demo_question(split)["input"]
    ask = ["run", "qst_generate", "--config", GENERATE_CONFIG, f"prompt={question}"]
    for command in (train, [*ask, "compare_with_base=True"]):
        status = _tune(command)
        if status != 0:
            return status
    _print_summary(output_dir, question)
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m qst_tune.quickstart", description=__doc__)
    parser.add_argument(
        "--prepare-only", action="store_true", help="fetch the model and make the data, then stop"
    )
    parser.add_argument("overrides", nargs="*", help="key=value, handed to tune run qst_finetune")
    return parser.parse_args()


def _tune(arguments: list[str]) -> int:
    """Run torchtune's own command line with this interpreter."""
    print(f"\n$ tune {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-W", "ignore", "-m", "torchtune._cli.tune", *arguments]
    return subprocess.run(command, check=False).returncode


def _tune_command() -> str:
    """Return how to call ``tune`` of this environment, whether or not it is activated."""
    tune = Path(sys.executable).with_name("tune")
    return "tune" if shutil.which("tune") == str(tune) else os.path.relpath(tune)


def _print_summary(output_dir: Path, question: str) -> None:
    summary: dict[str, Any] = json.loads((output_dir / "summary.json").read_text())
    losses = list(summary["val_loss"].values())
    memory = summary["memory_gib"]
    ask = f"{_tune_command()} run qst_generate --config {GENERATE_CONFIG}"
    parts = ", ".join(f"{name} {size:.3f}" for name, size in memory.items() if name != "peak")
    print(f"""
validation question    {question}
validation loss        {losses[0]:.3f} quantised base model -> {losses[-1]:.3f} tuned
trained                {summary["trainable_parameters"]:,} parameters in {summary["seconds"]:.0f} s
speed                  {summary["tokens_per_second"]:.0f} tokens/s
peak memory            {memory["peak"]:.2f} GiB, of which (GiB) {parts}
loss curve             {output_dir / "loss.png"}
side network           {output_dir / "side_network"}

Ask it something of your own:
  {ask} prompt="What does a with statement do?"
""")


if __name__ == "__main__":
    with safe_streams(), one_line_errors():
        sys.exit(main())
