"""docs/benchmarks.md, written from the results alone."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.backbones import Backbone
from benchmarks.costs import Cost
from benchmarks.methods import LORA_RANK, METHODS, REFERENCE, default_factor
from benchmarks.results import PACKAGES, Results
from benchmarks.statistics import Spread, spread
from benchmarks.timing import Shape

MIB = 1024**2
# What the project set itself: least ratios to the reference's step time, at the first shape; memory
# below that of a peer, at the longest shape at most half; share of the time in products.
TIME_GOALS = {
    **{"qlora_checkpointed": 3.0, "qlora": 2.3, "lora": 1.8, "full": 2.3},
    **{"qlora_checkpointed_best": 3.0, "qlora_best": 2.3, "lora_best": 1.8},
}
MEMORY_PEER = "qlora_checkpointed_best"
PRODUCT_GOAL = 0.7


def write_page(directory: Path, results: Results, losses: dict[str, Any] | None) -> Path:
    """Write the page.

    Args:
        directory (Path): of the documentation; the pictures lie there already.
        results (Results): what to show.
        losses (dict[str, Any] | None): from ``python -m benchmarks losses``, if that was run.

    Returns:
        Path: the page.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "benchmarks.md"
    path.write_text(render_page(results, losses))
    return path


def render_page(results: Results, losses: dict[str, Any] | None = None) -> str:
    """Return the page as Markdown.

    Args:
        results (Results): what to show.
        losses (dict[str, Any] | None): see :func:`write_page`.

    Returns:
        str: the page.
    """
    shape = next(iter(results.rounds))
    sections = [
        _header(results),
        _main_section(results, shape),
        _goals(results, shape),
        _sweep(results),
        _reduction_factors(results, shape),
        _operations(results, shape),
        _losses(losses),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _header(results: Results) -> str:
    settings = results.settings
    versions = ", ".join(f"{package} {settings[package]}" for package in PACKAGES)
    limit = spread(results.limit_gflops())
    commands = "\n".join(f"    {command}" for command in results.commands)
    backbone = Backbone(**settings["backbone"])
    sizes = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings["backbone"].items())
    return f"""# Benchmarks

Written by the command below, on {results.path.stem[:10]}; do not edit by hand.

{commands}

| | |
| --- | --- |
| machine | {settings["cpu"]}, {settings["cpu_capability"]}, {settings["cores"]} cores |
| threads | {settings["threads"]} |
| versions | Python {settings["python"]}, {versions} |
| limit | a bf16 matrix product of 2048 x 2048 x 2048 runs at {limit.text(0)} GFLOP/s |
| backbone | a Llama of {backbone.num_parameters / 1e6:.0f}M parameters: {sizes} |

All models are in bf16 with the same random weights. A step is forward, loss, backward and AdamW.
In each round every method takes one step on the same batch, one after another in turn; times are
the median over the rounds (least-greatest), and ratios are taken within a round. torchtune's
methods are its own models with its `CEWithChunkedOutputLoss` and fused AdamW, bf16 throughout; LoRA
has rank {LORA_RANK} on all linears of a layer.

Two slow paths on a CPU are not the methods' fault, so torchtune's stand here once as they are and
once without. "+ contiguous chunks": torchtune hands the LM head chunks of tokens with gaps between
the rows, for which torch copies a frozen head's weight once a row and chunk; here the chunk is
copied instead. "+ our NF4 decoding": our table in place of torchao's loops, with the same bits as
result. The tables over several shapes show the faster ones.

QST is what the recipe `qst_finetune` sets up by default, with fp32 side parameters and gradient
clipping, at r = {default_factor()}; "stored" and "recomputed" say what becomes of the side
network's activations."""


def _main_section(results: Results, shape: Shape) -> str:
    rows = [_main_row(results, shape, name) for name in _timed(results, shape)]
    columns = [
        "method",
        "step, s",
        "tokens/s",
        "time / QST",
        "memory above frozen weights, MiB",
        "allocated, MiB",
        "resident, MiB",
        "MFLOP / token",
        "FLOPs / QST",
        "time in products",
        "of backbone and head",
        "of the limit",
    ]
    return f"""## One step, {_describe(shape)}

![step times](benchmarks_time.png)

{_table(columns, rows)}

"QST" in a heading is the row in bold. Memory is what torch's allocator has given out at the peak
of a step, measured once in a process of its own (it repeats to the byte); "above frozen weights"
leaves out those (full fine-tuning has none). Resident is the process with Python and libraries.
FLOPs are counted by torch, in all matrix products. "Time in products" is the share of a profiled
step's time that passes in matrix products and attention, and "of backbone and head" the part of it
that is not an adapter's or a side network's; profiling adds to all other time. "Of the limit" is
FLOPs over time over the machine's limit."""


def _main_row(results: Results, shape: Shape, name: str) -> list[str]:
    seconds = spread(results.seconds(shape, name))
    cost = results.costs.get(name, {}).get(shape)
    reference = results.costs.get(REFERENCE, {}).get(shape)
    title = f"**{METHODS[name].title}**" if name == REFERENCE else METHODS[name].title
    row = [
        title,
        seconds.text(),
        f"{shape.total / seconds.median:.0f}",
        _ratio_text(results.ratio(shape, name, REFERENCE)),
    ]
    if cost is None:
        return [*row, *["-"] * 8]
    limit = spread(results.limit_gflops()).median * 1e9
    return [
        *row,
        f"{_above_frozen(cost):.0f}",
        f"{cost.peak_bytes / MIB:.0f}",
        f"{cost.peak_rss_bytes / MIB:.0f}",
        f"{cost.flops_per_token / 1e6:.0f}",
        f"{cost.flops_per_token / reference.flops_per_token:.2f}" if reference else "-",
        f"{cost.product_seconds / cost.seconds:.0%}",
        f"{cost.backbone_product_seconds / cost.seconds:.0%}",
        f"{cost.flops_per_token * shape.total / seconds.median / limit:.0%}",
    ]


def _goals(results: Results, shape: Shape) -> str:
    rows = [*_time_goals(results, shape), *_memory_goals(results), *_product_goal(results, shape)]
    if not rows:
        return ""
    columns = ["QST", "wanted, at least", "measured", "reached"]
    return f"## What we set out to reach\n\n{_table(columns, rows)}"


def _time_goals(results: Results, shape: Shape) -> Iterator[list[str]]:
    for name, goal in TIME_GOALS.items():
        ratio = results.ratio(shape, name, REFERENCE)
        if ratio is not None:
            what = f"step faster than {METHODS[name].title}, {shape}"
            yield [what, f"{goal:.1f}x", ratio.text(), _verdict(ratio.median >= goal)]


def _memory_goals(results: Results) -> Iterator[list[str]]:
    ours, theirs = (results.costs.get(name, {}) for name in (REFERENCE, MEMORY_PEER))
    shared = sorted(ours.keys() & theirs.keys(), key=lambda shape: shape.total)
    longest = max((shape.num_tokens for shape in shared), default=0)
    for shape in shared:
        goal = 2.0 if shape.num_tokens == longest and len(shared) > 1 else 1.0
        ratio = _above_frozen(theirs[shape]) / _above_frozen(ours[shape])
        what = (
            f"memory above the frozen weights below that of {METHODS[MEMORY_PEER].title}, {shape}"
        )
        yield [what, f"{goal:.1f}x", f"{ratio:.2f}", _verdict(ratio >= goal)]


def _product_goal(results: Results, shape: Shape) -> Iterator[list[str]]:
    cost = results.costs.get(REFERENCE, {}).get(shape)
    if cost is not None:
        share = cost.backbone_product_seconds / cost.seconds
        what = f"time in matrix products of backbone and head, {shape}"
        yield [what, f"{PRODUCT_GOAL:.0%}", f"{share:.0%}", _verdict(share >= PRODUCT_GOAL)]


def _verdict(reached: bool) -> str:
    return "yes" if reached else "**no**"


def _sweep(results: Results) -> str:
    shapes = list(results.rounds)
    if len(shapes) < 2:
        return ""
    swept = [name for name in METHODS if all(results.seconds(s, name) for s in shapes)]
    time_rows = [
        [METHODS[name].title, *(_ratio_text(results.ratio(s, name, REFERENCE)) for s in shapes)]
        for name in swept
    ]
    memory_rows = [
        [METHODS[name].title, *(_memory_text(results, s, name) for s in shapes)]
        for name in results.costs
        if all(s in results.costs[name] for s in shapes)
    ]
    columns = ["method", *map(str, shapes)]
    return f"""## Against batch and length

Rows x tokens a row. Step time relative to QST:

{_table(columns, time_rows)}

Memory above the frozen weights, MiB (relative to QST):

![memory](benchmarks_memory.png)

{_table(columns, memory_rows)}"""


def _reduction_factors(results: Results, shape: Shape) -> str:
    factors = {8: "qst_r8", 16: "qst_r16", 32: "qst_r32", default_factor(): REFERENCE}
    rows = []
    for factor, name in sorted(factors.items()):
        cost = results.costs.get(name, {}).get(shape)
        if cost is not None and results.seconds(shape, name):
            seconds = spread(results.seconds(shape, name)).text()
            ratio = _ratio_text(results.ratio(shape, name, REFERENCE))
            flops = f"{cost.flops_per_token / 1e6:.0f}"
            rows.append([str(factor), seconds, ratio, f"{_above_frozen(cost):.0f}", flops])
    if len(rows) < 2:
        return ""
    columns = ["r", "step, s", "time / QST", "memory above frozen weights, MiB", "MFLOP / token"]
    return f"## Against the reduction factor, {_describe(shape)}\n\n{_table(columns, rows)}"


def _operations(results: Results, shape: Shape) -> str:
    cost = results.costs.get(REFERENCE, {}).get(shape)
    if cost is None:
        return ""
    rows = [
        [f"`{name}`", f"{seconds:.3f}", f"{seconds / cost.seconds:.1%}"]
        for name, seconds in cost.operation_seconds.items()
    ]
    return f"""## Where a QST step's time goes, {_describe(shape)}

A profiled step of {METHODS[REFERENCE].title}, {cost.seconds:.2f} s, by operation:

{_table(["operation", "s", "share"], rows)}"""


def _losses(losses: dict[str, Any] | None) -> str:
    if losses is None:
        return ""
    rows = [
        [
            row["variant"],
            f"{row['train']:.4f}",
            f"{row['held_out']:.4f}",
            f"{row['change']:+.4f}",
            "-" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}",
        ]
        for row in losses["rows"]
    ]
    columns = ["", "training loss", "validation loss", "validation, from the first row", "gradient"]
    return f"""## The same loss with each optimisation on and off

    {losses["command"]}

{losses["what"]}

{_table(columns, rows)}

{losses["verdict"]}"""


# Small parts.


def _timed(results: Results, shape: Shape) -> list[str]:
    return [name for name in METHODS if results.seconds(shape, name)]


def _ratio_text(ratio: Spread | None) -> str:
    return "-" if ratio is None else ratio.text()


def _above_frozen(cost: Cost) -> float:
    return (cost.peak_bytes - cost.frozen_bytes) / MIB


def _memory_text(results: Results, shape: Shape, name: str) -> str:
    own = _above_frozen(results.costs[name][shape])
    reference = results.costs.get(REFERENCE, {}).get(shape)
    return f"{own:.0f} ({own / _above_frozen(reference):.2f})" if reference else f"{own:.0f}"


def _describe(shape: Shape) -> str:
    return f"{shape.batch_size} rows of {shape.num_tokens} tokens"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
