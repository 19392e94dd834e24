"""An estimate for people: a table, a picture, and the same figures as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from qst_tune.estimation.step import StepCost
from qst_tune.estimation.tracker import PARTS
from qst_tune.training.memory import GIB

JSON_FILE = "estimate.json"
PLOT_FILE = "estimate.png"

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
    """One method.

    Args:
        title (str): for people.
        cost (StepCost): of one training step.
        largest_batch (int | None): rows that fit into the memory asked about; None if not asked.
    """

    title: str
    cost: StepCost
    largest_batch: int | None = None


def table(rows: Mapping[str, Row]) -> str:
    """Lay an estimate out as aligned text.

    Args:
        rows (Mapping[str, Row]): by name of the method.

    Returns:
        str: lines; memory in GiB, the parts of a row add up to its peak.
    """
    titles = [f"{name}: {row.title}" for name, row in rows.items()]
    width = max(map(len, ["method", *titles]))
    header = ["peak", *_SHORT.values()]
    lines = [
        f"{'method':{width}}"
        + "".join(f"{name:>10}" for name in header)
        + f"  {'peak in':13}{'trained, M':>11}{'GFLOP/token':>13}"
    ]
    for title, row in zip(titles, rows.values(), strict=True):
        memory = row.cost.memory
        sizes = [memory.num_bytes, *(memory.parts[part] for part in PARTS)]
        lines.append(
            f"{title:{width}}"
            + "".join(f"{size / GIB:10.2f}" for size in sizes)
            + f"  {memory.phase:13}{row.cost.trainable_parameters / 1e6:11.1f}"
            + f"{row.cost.flops_per_token / 1e9:13.2f}"
        )
    return "\n".join(lines)


def fit_line(rows: Mapping[str, Row], fit_gib: float, seq_len: int) -> str:
    """Say in one line which batch fits.

    Args:
        rows (Mapping[str, Row]): with ``largest_batch``.
        fit_gib (float): the memory asked about, GiB.
        seq_len (int): tokens a row.

    Returns:
        str: one line.
    """
    batches = ", ".join(f"{name} {row.largest_batch or 'none'}" for name, row in rows.items())
    return f"largest batch of {seq_len} tokens a row that fits in {fit_gib:g} GiB: {batches}"


def write(
    folder: Path, rows: Mapping[str, Row], *, settings: Mapping[str, object], title: str
) -> None:
    """Write ``estimate.json`` and ``estimate.png``.

    Args:
        folder (Path): exists.
        rows (Mapping[str, Row]): by name of the method.
        settings (Mapping[str, object]): what the estimate is for.
        title (str): of the picture.
    """
    content = {
        "unit": "bytes; GiB = 2^30 bytes",
        "settings": dict(settings),
        "methods": {name: asdict(row) for name, row in rows.items()},
    }
    (folder / JSON_FILE).write_text(json.dumps(content, indent=2) + "\n")
    _plot(folder / PLOT_FILE, rows, title)


def _plot(path: Path, rows: Mapping[str, Row], title: str) -> None:
    from matplotlib.figure import Figure  # slow to import, and needed only here

    figure = Figure(figsize=(9, 1.5 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    titles = [row.title for row in rows.values()]
    left = [0.0] * len(rows)
    for part in PARTS:
        sizes = [row.cost.memory.parts[part] / GIB for row in rows.values()]
        axes.barh(titles, sizes, left=left, label=part)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for index, total in enumerate(left):
        axes.text(total, index, f" {total:.1f}", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("peak memory of one training step, GiB")
    axes.set_title(title)
    axes.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=120)
