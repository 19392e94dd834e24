"""What many side networks on one backbone cost: ``python -m benchmarks.side_networks``.

A batch of rows is decoded token by token, behind a prompt that is in the caches. The rows are
spread over 1, 4 or 16 side networks, which share each pass of the backbone. For comparison: the
backbone alone, and one pass of backbone and side network for each of them, as separate models
would need. Rounds are interleaved, and the table has each median as a multiple of the backbone's,
so that a busy machine slows all of them alike.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch

from benchmarks.backbones import BACKBONES, DTYPE, Backbone, dense_backbone
from qst_tune.generation.caches import GrowingCache, attached, attentions
from qst_tune.models import qst_decoder
from qst_tune.models.llama import qst_llama3_2
from qst_tune.modules.qst_decoder import QSTDecoder
from qst_tune.modules.side_network import SideNetwork
from qst_tune.modules.side_networks import share_backbone
from qst_tune.training.memory import parameter_bytes

COUNTS = (1, 4, 16)
_MIB = 2**20


class Decoding:
    """Some rows that are decoded behind a prompt.

    Args:
        model (QSTDecoder): with several side networks.
        names (list[str | None]): of the side network of each row.
        num_prompt_tokens (int): tokens a row that are in the caches.
    """

    def __init__(self, model: QSTDecoder, names: list[str | None], num_prompt_tokens: int) -> None:
        self.model = model
        self.names = names
        self.num_prompt_tokens = num_prompt_tokens
        self.caches = [GrowingCache() for _ in attentions(model)]
        self.run(num_prompt_tokens)

    def step(self) -> None:
        """Decode one token of each row, always the first behind the prompt."""
        for cache in self.caches:
            cache.cut(self.num_prompt_tokens)
        self.run(1)

    @torch.no_grad()
    def run(self, num_new: int) -> None:
        """Run new tokens of every row.

        Args:
            num_new (int): tokens a row.
        """
        side: Any = self.model.side
        side.use(self.names)
        start = self.caches[0].length
        everywhere = torch.arange(start + num_new)
        positions = everywhere[start:]
        mask = positions[:, None] >= everywhere
        tokens = torch.ones(len(self.names), num_new, dtype=torch.long)
        with attached(self.model, self.caches):
            self.model(tokens, mask=mask[None], input_pos=positions[None])


def build(backbone: Backbone, count: int) -> QSTDecoder:
    """Build a quantised backbone with random side networks, named by numbers.

    Args:
        backbone (Backbone): sizes.
        count (int): side networks.

    Returns:
        QSTDecoder: in evaluation mode.
    """
    model = qst_decoder(dense_backbone(backbone))
    networks: dict[str, SideNetwork] = {"0": model.side}
    for number in range(1, count):
        with torch.device("meta"):
            networks[str(number)] = qst_llama3_2(**backbone.builder_arguments()).side
        networks[str(number)].materialize(torch.device("cpu"))
    share_backbone(model, networks)
    model.eval()
    return model


def ways(model: QSTDecoder, num_rows: int, num_prompt_tokens: int) -> dict[str, Callable[[], None]]:
    """Say what is timed.

    Args:
        model (QSTDecoder): with at least as many side networks as the largest of ``COUNTS``.
        num_rows (int): rows of a batch.
        num_prompt_tokens (int): tokens a row that are in the caches.

    Returns:
        dict[str, Callable[[], None]]: one decoding step of all rows, by name.
    """

    def decoding(names: list[str | None]) -> Decoding:
        return Decoding(model, names, num_prompt_tokens)

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


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Time all ways by turns.

    Args:
        steps (dict[str, Callable[[], None]]): from :func:`ways`.
        rounds (int): how often each.

    Returns:
        dict[str, float]: median milliseconds a step.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


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
    medians = measure(ways(model, asked.rows, asked.prompt_tokens), asked.rounds)
    print("| one token of each row | ms | of the backbone |\n| --- | --- | --- |")
    for name, median in medians.items():
        print(f"| {name} | {median:.1f} | {median / medians['backbone alone']:.2f} |")


if __name__ == "__main__":
    main()
