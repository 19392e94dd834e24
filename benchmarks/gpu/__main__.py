"""Times and memory on one GPU, offline, with random weights: ``python -m benchmarks.gpu``.

``train``     steps of QST, of torchtune's QLoRA and of PEFT's, by turns
``generate``  tokens a second, with the side network and without it
``loss``      the cross entropy of the LM head
``pieces``    decoding of a weight, and products with it
``long``      a step of one long row
``dial``      steps with LoRA in the last quarter, two thirds or all of the layers
``compiled``  steps of torchtune's QLoRA with torch.compile
``unsloth``   steps of Unsloth's QLoRA, in a process of its own

LLaMA-2-7B's shape in bf16, layers in NF4. Every row is printed, and added to
``benchmarks/results/gpu.jsonl`` with device and versions. ``--page`` writes those of
docs/benchmarks_gpu.md and README.md anew from that file. ``--tiny`` runs all of it on any device in
a minute, which shows that it runs and nothing else.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.decoded import generate
from benchmarks.gpu.losses import loss
from benchmarks.gpu.page import write_pages
from benchmarks.gpu.pieces import pieces
from benchmarks.gpu.rows import EVERY, RESULTS, Row, add, circumstances, read
from benchmarks.gpu.steps import compiled, dial, long, train
from benchmarks.gpu.turns import one_line
from benchmarks.gpu.unsloth import LIMIT_S, unsloth
from benchmarks.methods import ignore_known_warnings

Section = Callable[[Bench], Iterator[Row]]
# With the seconds that each may take, by and large: what has begun is finished.
SECTIONS: dict[str, tuple[Section, float]] = {
    "train": (train, 110),
    "generate": (generate, 25),
    "loss": (loss, 10),
    "pieces": (pieces, 20),
    "long": (long, 35),
    "dial": (dial, 70),
    "compiled": (compiled, 70),
    "unsloth": (unsloth, LIMIT_S),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the sections that are asked for, print and store their rows; returns the exit status."""
    options = _parse(arguments)
    asked = options.sections.split(",")
    unknown = [name for name in asked if name not in SECTIONS]
    if unknown:
        print(f"--sections {unknown[0]}: choose from {','.join(SECTIONS)}", file=sys.stderr)
        return 2
    if options.page:
        write_pages(read(options.results or RESULTS))
        return 0
    results = options.results or (None if options.tiny else RESULTS)
    ignore_known_warnings()
    for library in ("bitsandbytes", "liger_kernel", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)  # of what they lack and we do not need
    bench = Bench(tiny=options.tiny, rounds=options.rounds)
    where = circumstances(options.revision)
    print(json.dumps(where), flush=True)
    for name in asked:
        start = time.perf_counter()
        for row in _rows(name, bench):
            print(json.dumps(row), flush=True)
            if results is not None:
                add(results, {**row, **where})
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return 0


def _rows(name: str, bench: Bench) -> Iterator[Row]:
    """Rows of a section; one that fails ends with its error."""
    section, seconds = SECTIONS[name]
    try:
        bench.begin(seconds)
        yield from section(bench)
    except Exception as error:  # whatever it is: the other sections go on
        yield {"section": name, "method": EVERY, "shape": "", "error": one_line(error)}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help="in this order")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps; 2 of the longest")
    parser.add_argument("--results", type=Path, help=f"default {RESULTS.name}; none with --tiny")
    parser.add_argument("--page", action="store_true", help="write the pages, measure nothing")
    parser.add_argument("--revision", help="of the code, where git does not know it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
