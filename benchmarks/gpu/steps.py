"""Sections ``train``, ``compiled``, ``long`` and ``dial``: whole training steps by turns."""

from collections.abc import Iterator

from benchmarks.gpu import peers
from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.methods import DIAL, QST
from benchmarks.gpu.ours import plain_step

PLAIN = "QST, neither Triton nor CUDA graphs"
FLOOR = "products of one forward pass alone"
# Steps of so many tokens take seconds in some methods, and differ by 0.1 %.
MANY_TOKENS = 20_000


def train(bench: Bench) -> Iterator[Row]:
    """Measure every method at each shape, except the one that compiles."""
    methods = [QST, peers.TORCHTUNE, peers.PEFT_LIGER, peers.PEFT]
    runners = [bench.trainee(method) for method in methods]
    runners.insert(1, bench.runner(PLAIN, plain_step, QST, replays=False))
    for shape in bench.sizes.shapes:
        yield _floor(bench, shape)
        yield from bench.steps("train", runners, shape, _rounds(bench, shape))


def compiled(bench: Bench) -> Iterator[Row]:
    """Measure the method that compiles for half a minute a shape, beside QST again."""
    runners = [bench.trainee(method) for method in (QST, peers.TORCHTUNE_COMPILED)]
    for shape in bench.sizes.shapes:
        _, row = bench.steps("train", runners, shape, _rounds(bench, shape))
        yield row


def _rounds(bench: Bench, shape: tuple[int, int]) -> int:
    return min(2, bench.rounds) if shape[0] * shape[1] > MANY_TOKENS else bench.rounds


def long(bench: Bench) -> Iterator[Row]:
    """Measure one row of many tokens, which fits in memory with few methods."""
    for number, length in enumerate(bench.sizes.long_rows):
        methods = [QST, peers.PEFT_LIGER] if number == 0 else [QST]
        runners = [bench.trainee(method) for method in methods]
        yield from bench.steps("long", runners, (1, length), _rounds(bench, (1, length)))


def dial(bench: Bench) -> Iterator[Row]:
    """Measure LoRA in the last layers beside QLoRA."""
    runners = [bench.trainee(method) for method in (*DIAL, peers.TORCHTUNE)]
    for shape in bench.sizes.dial_shapes:
        yield from bench.steps("dial", runners, shape, _rounds(bench, shape))


def _floor(bench: Bench, shape: tuple[int, int]) -> Row:
    """Time of the products of weights and tokens at the speed of a plain product of this run."""
    backbone, num_tokens = bench.sizes.backbone, shape[0] * shape[1]
    num_weights = backbone.num_parameters - backbone.vocab_size * backbone.embed_dim
    return {
        "section": "train",
        "method": FLOOR,
        "shape": f"{shape[0]} x {shape[1]}",
        "ms": round(2 * num_weights * num_tokens / bench.tflops / 1e9, 3),
        "tflops": round(bench.tflops, 3),
    }
