"""Section ``generate``: a token of each row behind a prompt that is in the caches."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.decoding import Decoding
from benchmarks.gpu import peers
from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.methods import QST
from benchmarks.gpu.turns import Step, take_turns

WITH_SIDE = "with the side network"
ALONE = "backbone alone"
PEFT = "PEFT + bitsandbytes"


def generate(bench: Bench) -> Iterator[Row]:
    """Measure the model with its side network, without it, and PEFT's."""
    for num_rows in bench.sizes.decoded_rows:
        sizes: Any = {"num_rows": num_rows, "num_prompt_tokens": bench.sizes.prompt_tokens}
        runners = [
            bench.runner(WITH_SIDE, partial(_ours, bench, False, **sizes), QST),
            bench.runner(ALONE, partial(_ours, bench, True, **sizes), QST),
            bench.runner(PEFT, partial(peers.peft_decoding, **sizes), peers.PEFT),
        ]
        turns = [None] * (2 + 4 * bench.rounds)
        taken = take_turns(runners, turns, bench.clock, bench.deadline)
        for method, times in taken.items():
            row = bench.row("generate", method, f"{num_rows} x 1", times)
            if "ms" in row:
                row["tokens_per_s"] = round(1000 * num_rows / row["ms"], 1)
            yield row


def _ours(bench: Bench, disabled: bool, model: Any, **sizes: int) -> Step:
    model.eval()
    with bench.device:
        decoding = Decoding(model, partial(setattr, model.side, "disabled", disabled), **sizes)
        for _ in range(3):  # until it is captured
            decoding.step()
    model.side.disabled = False

    def step(_: object) -> None:
        model.eval()
        with bench.device:
            decoding.step()
        model.side.disabled = False

    return step
