"""An estimate for people: a table, and the same figures as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qst_tune.estimation.step import StepCost
from qst_tune.estimation.tracker import PARTS
from qst_tune.modules.memory import GIB

JSON_FILE = "estimate.json"

_SHORT = {
    "frozen weights": "frozen",
    "trainable weights": "trained",
    "optimizer states": "optimizer",
    "gradients": "gradients",
    "saved activations": "saved",
    "logits and loss": "loss",
    "transient": "transient",
}


@dataclass(frozen=True)
class Row:
    """One method: its title, a step's cost, and the rows that fit into the memory asked about."""

    title: str
    cost: StepCost
    largest_batch: int | None = None


def table(rows: Sequence[Row]) -> str:
    """Lay an estimate out as aligned text; memory in GiB, the parts of a row add up to its peak."""
    width = max(len("method"), *(len(row.title) for row in rows))
    header = ["peak", *_SHORT.values()]
    lines = [
        f"{'method':{width}}"
        + "".join(f"{name:>10}" for name in header)
        + f"  {'peak in':13}{'trained, M':>11}{'GFLOP/token':>13}"
    ]
    for row in rows:
        memory = row.cost.memory
        sizes = [memory.num_bytes, *(memory.parts[part] for part in PARTS)]
        lines.append(
            f"{row.title:{width}}"
            + "".join(f"{size / GIB:10.2f}" for size in sizes)
            + f"  {memory.phase:13}{row.cost.trainable_parameters / 1e6:11.1f}"
            + f"{row.cost.flops_per_token / 1e9:13.2f}"
        )
    return "\n".join(lines)


def write(directory: Path, row: Row, settings: Mapping[str, object]) -> None:
    """Write ``estimate.json``: the row, and what it is for."""
    content = {
        "unit": "bytes; GiB = 2^30 bytes",
        "settings": dict(settings),
        "estimate": asdict(row),
    }
    (directory / JSON_FILE).write_text(json.dumps(content, indent=2) + "\n")
