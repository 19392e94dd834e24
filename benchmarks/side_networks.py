"""What many side networks on one backbone cost: ``python -m benchmarks.side_networks``.

A batch of rows is decoded token by token, behind a prompt that is in the caches. The rows are
spread over 1, 4 or 16 side networks, which share each pass of the backbone. For comparison: the
backbone alone, and one pass of backbone and side network for each of them, as separate models
would need. Rounds are interleaved, and the table has each median as a multiple of the backbone's,
so that a busy machine slows all of them alike.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from statistics import median
from timeit import repeat
from typing import Any

import torch

from benchmarks.backbones import BACKBONES, DTYPE, Backbone, dense_backbone
from benchmarks.decoding import Decoding, milliseconds_by_turns
from qst_tune.models import qst_decoder
from qst_tune.models.llama import qst_llama3_2
from qst_tune.modules.memory import parameter_bytes
from qst_tune.modules.meta_device import materialize
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.network import SideNetwork
from qst_tune.modules.side.per_row import share_backbone

COUNTS = (1, 4, 16)
_MIB = 2**20


def build(backbone: Backbone, count: int) -> QSTModel:
    """Build a quantised backbone with random side networks, named by numbers.

    Args:
        backbone (Backbone): sizes.
        count (int): side networks.

    Returns:
        QSTModel: in evaluation mode.
    """
    model = qst_decoder(dense_backbone(backbone))
    networks: dict[str, SideNetwork] = {"0": model.side}
    for number in range(1, count):
        with torch.device("meta"):
            networks[str(number)] = qst_llama3_2(**backbone.builder_arguments()).side
        materialize(networks[str(number)], torch.device("cpu"))
    share_backbone(model, networks)
    model.eval()
    return model


def ways(model: QSTModel, num_rows: int, num_prompt_tokens: int) -> dict[str, Callable[[], None]]:
    """Say what is timed.

    Args:
        model (QSTModel): with at least as many side networks as the largest of ``COUNTS``.
        num_rows (int): rows of a batch.
        num_prompt_tokens (int): tokens a row that are in the caches.

    Returns:
        dict[str, Callable[[], None]]: one decoding step of all rows, by name.
    """

    def decoding(names: list[str | None]) -> Decoding:
        side: Any = model.side
        prepare = partial(side.use, names)
        return Decoding(model, prepare, num_rows=len(names), num_prompt_tokens=num_prompt_tokens)

    found = {"backbone alone": decoding([None] * num_rows).step}
    for count in COUNTS:
        names: list[str | None] = list(islice(cycle(map(str, range(count))), num_rows))
        found[f"{count} in one pass"] = decoding(names).step
        if count > 1:
            alone = [decoding([name] * names.count(name)) for name in sorted(set(map(str, names)))]
            found[f"{count} in passes of their own"] = partial(_step_all, alone)
    return found


def _step_all(parts: list[Decoding]) -> None:
    for part in parts:
        part.step()


def switch_microseconds(model: QSTModel, num_rows: int) -> tuple[float, float]:
    """Time changing the side network in use, there and back.

    Args:
        model (QSTModel): with at least two side networks.
        num_rows (int): rows of a batch.

    Returns:
        tuple[float, float]: microseconds a change, of all rows to one network and to a network a
        row; the least of some repetitions.
    """
    side: Any = model.side
    rows = list(islice(cycle(side.names), num_rows))
    turned = rows[1:] + rows[:1]

    def microseconds(first: Any, second: Any) -> float:
        def both() -> None:
            side.use(first)
            side.use(second)

        return min(repeat(both, number=500, repeat=9)) / 1000 * 1e6

    return microseconds("0", "1"), microseconds(rows, turned)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table.

    Args:
        arguments (list[str] | None): of the command line; None: this program's.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side_networks")
    parser.add_argument("--backbone", choices=BACKBONES, default="200m")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args(arguments)
    model = build(BACKBONES[asked.backbone], max(COUNTS))
    whole, sides = (parameter_bytes(module) / _MIB for module in (model, model.side))
    each = sides / max(COUNTS)
    print(f"backbone {whole - sides:.1f} MiB ({DTYPE}), each side network {each:.2f} MiB")
    one, many = switch_microseconds(model, asked.rows)
    print(f"switching takes {one:.1f} us, to a network for each of {asked.rows} rows {many:.1f} us")
    steps = ways(model, asked.rows, asked.prompt_tokens)
    times = milliseconds_by_turns(steps, asked.rounds)
    medians = {name: median(taken) for name, taken in times.items()}
    print("| one token of each row | ms | of the backbone |\n| --- | --- | --- |")
    for name, taken in medians.items():
        print(f"| {name} | {taken:.1f} | {taken / medians['backbone alone']:.2f} |")


if __name__ == "__main__":
    main()
