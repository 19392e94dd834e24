"""Speed of decoding with a side network: ``python -m benchmarks.decoding --backbone smollm2``.

Rows are decoded token by token, greedily, behind a prompt that is in the caches: by the quantised
backbone alone, with the side network beside it, and for SmolLM2 by transformers' own model in bf16.
They take tokens by turns, in an order that changes, so that a busy machine slows all alike; the
speed of one relative to another is taken from the times of neighbouring tokens.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.backbones import BACKBONES
from benchmarks.methods import CPU, SMOLLM2, default_config, ignore_known_warnings, qst_model
from qst_tune.generation.caches import ModelCaches, last_logits
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
        self.caches, self.length = ModelCaches(model), 0
        self.run(torch.ones(num_rows, num_prompt_tokens, dtype=torch.long))
        self.tokens = torch.ones(num_rows, 1, dtype=torch.long)

    def step(self) -> None:
        """Decode one token of each row, always the first behind the prompt."""
        self.length = self.caches.cut(self.num_prompt_tokens, num_new=1)
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
        whole = (len(tokens), self.length + tokens.shape[1])
        is_real = torch.ones(whole, dtype=torch.bool, device=tokens.device)
        return last_logits(self.model, self.caches, tokens, is_real).argmax(-1, keepdim=True)


def transformers_step(num_rows: int, num_prompt_tokens: int) -> Callable[[], object]:
    """Load SmolLM2 as transformers does, in bf16.

    Args:
        num_rows (int): rows of the batch.
        num_prompt_tokens (int): tokens a row that are in the cache.

    Returns:
        Callable[[], object]: decodes the first token behind the prompt.
    """
    directory = Path(default_config().checkpointer.checkpoint_dir).expanduser()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def run(tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(tokens, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def step() -> torch.Tensor:
        cache.crop(-1)
        return run(tokens)

    tokens = run(torch.ones(num_rows, num_prompt_tokens, dtype=torch.long))
    run(tokens)
    return step


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
    with_theirs = asked.backbone == SMOLLM2
    theirs = " transformers, bf16 | speed, of transformers' |" if with_theirs else ""
    print(f"| rows | backbone alone, ms a token | with the side network | of its speed |{theirs}")
    print("| --- | --- | --- | --- |" + " --- | --- |" * with_theirs)
    for num_rows in asked.rows:
        steps: dict[str, Callable[[], object]] = {
            name: Decoding(
                model,
                partial(setattr, model.side, "disabled", name == "alone"),
                num_rows=num_rows,
                num_prompt_tokens=asked.prompt_tokens,
            ).step
            for name in ("alone", "beside")
        }
        if with_theirs:
            steps["theirs"] = transformers_step(num_rows, asked.prompt_tokens)
        times = milliseconds_by_turns(steps, asked.rounds)
        milliseconds = {n: f"{median(t):.1f} (least {min(t):.1f})" for n, t in times.items()}
        cells = [milliseconds["alone"], milliseconds["beside"], _share(times, "alone")]
        if with_theirs:
            cells += [milliseconds["theirs"], _share(times, "theirs")]
        print(f"| {num_rows} | {' | '.join(cells)} |")


def _share(times: dict[str, list[float]], of: str) -> str:
    """Speed with the side network, of another's."""
    share, low, high = relative_speed(times[of], times["beside"])
    return f"{share:.1%} ({low:.1%}-{high:.1%})"


if __name__ == "__main__":
    main()
