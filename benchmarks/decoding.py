"""Speed of decoding with a side network: ``python -m benchmarks.decoding --backbone smollm2``.

Rows are decoded token by token, greedily, behind a prompt that is in the caches: by the quantised
backbone alone and with the side network beside it. The two take tokens by turns, in an order that
changes, so that a busy machine slows both alike; the speed of one relative to the other is taken
from the times of neighbouring tokens.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import torch

from benchmarks.backbones import BACKBONES
from benchmarks.methods import CPU, SMOLLM2, ignore_known_warnings, qst_model
from qst_tune.generation.caches import GrowingCache, attached, attentions
from qst_tune.modules.qst_model import QSTModel


class Decoding:
    """Some rows that are decoded behind a prompt.

    Args:
        model (QSTModel): in evaluation mode.
        prepare (Callable[[], object]): called before each pass; says what the model computes.
        num_rows (int): rows of the batch.
        num_prompt_tokens (int): tokens a row that are in the caches.
    """

    def __init__(
        self,
        model: QSTModel,
        prepare: Callable[[], object],
        *,
        num_rows: int,
        num_prompt_tokens: int,
    ) -> None:
        self.model = model
        self.prepare = prepare
        self.num_prompt_tokens = num_prompt_tokens
        self.caches = [GrowingCache() for _ in attentions(model)]
        self.run(torch.ones(num_rows, num_prompt_tokens, dtype=torch.long))
        self.tokens = torch.ones(num_rows, 1, dtype=torch.long)

    def step(self) -> None:
        """Decode one token of each row, always the first behind the prompt."""
        for cache in self.caches:
            cache.cut(self.num_prompt_tokens)
        self.tokens = self.run(self.tokens)

    @torch.no_grad()
    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run new tokens of every row.

        Args:
            tokens (torch.Tensor): ``[B, T]``.

        Returns:
            torch.Tensor: the likeliest next token of each row, ``[B, 1]``.
        """
        self.prepare()
        start = self.caches[0].length
        everywhere = torch.arange(start + tokens.shape[1])
        positions = everywhere[start:]
        mask = positions[:, None] >= everywhere
        with attached(self.model, self.caches):
            logits: torch.Tensor = self.model(tokens, mask=mask[None], input_pos=positions[None])
        return logits[:, -1].argmax(-1, keepdim=True)


def milliseconds_by_turns(
    steps: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Time all of them by turns; another one begins each round.

    Args:
        steps (Mapping[str, Callable[[], object]]): by name.
        rounds (int): how often each, after once to warm up.

    Returns:
        dict[str, list[float]]: milliseconds of each round.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            steps[name]()
            taken[name].append(1000 * (time.perf_counter() - start))
    return {name: times[1:] for name, times in taken.items()}


def relative_speed(alone: list[float], beside: list[float]) -> tuple[float, float, float]:
    """Compare times of neighbouring tokens.

    Args:
        alone (list[float]): of the backbone alone.
        beside (list[float]): with the side network, of the same rounds.

    Returns:
        tuple[float, float, float]: median of the speed as a share of the backbone's, and between
        which bounds its middle half lies.
    """
    shares = sorted(a / b for a, b in zip(alone, beside, strict=True))
    quarter = len(shares) // 4
    return median(shares), shares[quarter], shares[-1 - quarter]


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table.

    Args:
        arguments (list[str] | None): of the command line; None: this program's.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding")
    parser.add_argument("--backbone", choices=[*BACKBONES, SMOLLM2], default="200m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--base-quantization", default="nf4", help="none: the backbone in bf16")
    asked = parser.parse_args(arguments)
    ignore_known_warnings()
    model = qst_model(asked.backbone, base_quantization=asked.base_quantization)
    model.initialize_side(CPU)
    model.eval()
    print(
        "| rows | backbone alone, ms a token | with the side network | speed, of the backbone's |"
    )
    print("| --- | --- | --- | --- |")
    for num_rows in asked.rows:
        steps = {
            name: Decoding(
                model,
                partial(setattr, model.side, "disabled", name == "alone"),
                num_rows=num_rows,
                num_prompt_tokens=asked.prompt_tokens,
            ).step
            for name in ("alone", "beside")
        }
        times = milliseconds_by_turns(steps, asked.rounds)
        share, low, high = relative_speed(times["alone"], times["beside"])
        cells = [f"{median(times[name]):.1f} (least {min(times[name]):.1f})" for name in steps]
        print(f"| {num_rows} | {cells[0]} | {cells[1]} | {share:.1%} ({low:.1%}-{high:.1%}) |")


if __name__ == "__main__":
    main()
