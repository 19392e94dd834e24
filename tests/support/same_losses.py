"""Compare two checkouts: the losses and trained tensors of short runs must be equal to the bit.

The proof of a refactoring. Each run is some steps of a shipped config on the CPU; it reads the
model and the data of ``make quickstart``. SST-2 and Alpaca are read from ``--data``, a directory
with ``sst2/train_sentences.jsonl``, ``sst2/dev.jsonl`` and ``alpaca/heldout.jsonl``; without it,
their runs are skipped and named::

    python -m tests.support.same_losses <OLD CHECKOUT> <NEW CHECKOUT> --data <DIRECTORY>

About four minutes a checkout on two cores. Exit status 1 if anything differs. Numbers of two
machines, or of two numbers of threads, are not comparable.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

CACHE = Path.home() / ".cache/qst_tune"
MODEL = CACHE / "SmolLM2-135M-Instruct"
VALIDATION = CACHE / "python_docs/heldout.jsonl"
SHORT = [
    "tokenizer.max_seq_len=128",
    "batch_size=4",
    "max_steps_per_epoch=4",
    "device=cpu",
    "log_every_n_steps=1",
]
FEW = "dataset_val.split=train[:16]"


def runs(data: Path | None, root: Path) -> dict[str, list[str]]:
    """Arguments of ``tune run`` by name. ``root`` may be written to."""
    named = {
        "qst": ["qst_finetune", "--config", "smollm2/135M_qst", FEW],
        "cached": [
            *("qst_finetune", "--config", "smollm2/135M_qst", "epochs=2"),
            *(f"hidden_state_cache={root / 'hidden'}", "gradient_accumulation_steps=2"),
            *("dataset.split=train[:200]", "dataset_val=null", "val_fraction=0.005"),
        ],
        "packed": [
            *("qst_finetune", "--config", "smollm2/135M_qst", "dataset.packed=True"),
            *("dataset.split=train[:200]", "dataset_val=null"),
            "enable_activation_checkpointing=False",
        ],
        "lst": ["qst_finetune", "--config", "smollm2/135M_lst", FEW],
        "peqa": ["peqa_finetune", "--config", "smollm2/135M_peqa_4bit", FEW],
        "dpo": [
            *("qst_dpo", "--config", "smollm2/135M_qst_dpo"),
            f"dataset.data_files={write_pairs(root / 'pairs.jsonl')}",
        ],
    }
    if data is None:
        return named
    alpaca = [f"checkpoint_dir={MODEL}", f"dataset.data_files={data / 'alpaca/heldout.jsonl'}"]
    return {
        **named,
        "sst2": [
            *("qst_finetune", "--config", "smollm2/135M_qst_sst2", "dataset.source=json"),
            f"dataset.data_files={data / 'sst2/train_sentences.jsonl'}",
            f"dataset_val.data_files={data / 'sst2/dev.jsonl'}",
            "dataset_val.split=train[:40]",
        ],
        "auto": ["qst_finetune", "--config", "auto/qst", *alpaca, "val_fraction=0.02"],
        "auto_peqa": [
            *("peqa_finetune", "--config", "auto/peqa_4bit"),
            *(*alpaca, "val_fraction=0.02"),
        ],
    }


def write_pairs(path: Path) -> Path:
    """Pairs of a right answer and that of the next question."""
    rows = [json.loads(line) for line in VALIDATION.read_text().splitlines()[:60]]
    with path.open("w") as file:
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
            question = {"role": "user", "content": row["input"]}
            answers = {"chosen": row["output"], "rejected": other["output"]}
            turns = {
                key: [question, {"role": "assistant", "content": text[:300]}]
                for key, text in answers.items()
            }
            file.write(json.dumps(turns) + "\n")
    return path


def figures(directory: Path) -> dict[str, Any]:
    """Losses and metrics of a run, and a digest of every tensor of its result."""
    summary = json.loads((directory / "summary.json").read_text())
    found = {
        # The key of earlier versions.
        key.replace("held_out_loss", "val_loss"): value
        for key, value in summary.items()
        if "loss" in key or key in ("metrics", "best_step", "trainable_parameters")
    }
    for file in sorted(directory.glob("*/*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                data = tensors.get_tensor(name).contiguous().numpy().tobytes()
                found[f"{file.name} {name}"] = hashlib.sha256(data).hexdigest()
    return found


def run(checkout: Path, name: str, arguments: list[str], directory: Path) -> dict[str, Any]:
    """Run one config with a checkout's own environment; its figures, or the error's last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    tune = [str(checkout / ".venv/bin/python"), "-m", "torchtune._cli.tune", "run"]
    output = directory / name
    done = subprocess.run(
        [*tune, *arguments, *SHORT, f"output_dir={output}"],
        cwd=directory,
        env={**environment, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"error": (done.stderr.splitlines() or ["no message"])[-1]}
    return figures(output)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each figure that is not the same in both."""
    if "error" in old or "error" in new:
        return [f"{side}: {f['error']}" for side, f in (("old", old), ("new", new)) if "error" in f]
    return [
        f"{key}: {old.get(key)} before, {new.get(key)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def main() -> int:
    """Compare; the exit status is 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--data", type=Path, help="directory with sst2/ and alpaca/")
    parser.add_argument("--only", nargs="*", help="names of runs")
    args = parser.parse_args()
    if not VALIDATION.is_file() or not MODEL.is_dir():
        print("run `make quickstart` first: its model and data are read")
        return 1
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        chosen = runs(args.data and args.data.resolve(), root)
        if args.data is None:
            print("sst2, auto, auto_peqa: skipped, name --data")
        for name, arguments in chosen.items():
            if args.only and name not in args.only:
                continue
            both = []
            for side in ("old", "new"):
                directory = root / side
                directory.mkdir(exist_ok=True)
                both.append(run(getattr(args, side).resolve(), name, arguments, directory))
            found = differences(*both)
            failed = failed or bool(found)
            print(f"{name}: {'differs' if found else 'same'}", *found, sep="\n    ", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
