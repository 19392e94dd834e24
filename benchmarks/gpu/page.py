"""Tables of docs/benchmarks_gpu.md and README.md, written from the stored rows.

A page has each table between two comments, ``<!-- gpu: NAME -->`` and ``<!-- end -->``; the text
around them is written by hand and has no figures of its own.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.gpu import peers
from benchmarks.gpu.decoded import ALONE, PEFT, WITH_SIDE
from benchmarks.gpu.losses import LOSSES
from benchmarks.gpu.methods import DIAL, QST
from benchmarks.gpu.pieces import DECODINGS, PRODUCTS
from benchmarks.gpu.rows import EVERY, Row
from benchmarks.gpu.steps import FLOOR, PLAIN
from benchmarks.gpu.turns import NO_TIME
from benchmarks.gpu.unsloth import UNSLOTH

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks_gpu.md")
_PLACE = re.compile(r"(<!-- gpu: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_PEERS = (peers.TORCHTUNE, peers.TORCHTUNE_COMPILED, peers.PEFT, peers.PEFT_LIGER)
_FIRST = {
    peers.TORCHTUNE: "torchtune QLoRA",
    peers.PEFT: "PEFT + bitsandbytes QLoRA",
    peers.PEFT_LIGER: "the same with Liger",
    UNSLOTH: UNSLOTH,
}
Cell = Callable[[Row], str]


def write_pages(rows: Sequence[Row], pages: Iterable[Path] = PAGES) -> None:
    """Write the tables of the pages anew."""
    for page in pages:
        page.write_text(with_tables(page.read_text(), rows))


def with_tables(text: str, rows: Sequence[Row]) -> str:
    """Return the text of a page with its tables as the rows say."""
    figures = Figures(rows)
    return _PLACE.sub(lambda m: m[1] + TABLES[m[2]](figures) + "\n" + m[3], text)


class Figures:
    """The newest row of each section, method and shape on the device where QST trained last."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.all = [row for row in rows if row["method"] == QST and "ms" in row]
        self.device = (self.all or rows)[-1]["device"]
        self.rows = [row for row in rows if row["device"] == self.device]
        self.newest: dict[tuple[str, str, str], Row] = {}
        for row in self.rows:
            key = (row["section"], row["method"], row["shape"])
            if NO_TIME not in row.get("error", "") or key not in self.newest:
                self.newest[key] = row
        self.last = next((r for r in reversed(self.all) if r["section"] == "train"), rows[-1])

    def section(self, name: str) -> list[Row]:
        """Return the newest rows of a section."""
        return [row for (section, *_), row in self.newest.items() if section == name]

    def shapes(self, section: str) -> list[str]:
        """Return the shapes of a section, the smallest first."""
        shapes = {row["shape"] for row in self.section(section) if row["method"] != EVERY}
        return sorted(shapes, key=_size)

    def cell(self, section: str, method: str, shape: str, show: Cell) -> str:
        """Return one figure, with its day or revision if QST was measured on another since."""
        row = self.newest.get((section, method, shape))
        if row is None:
            return ""
        if "error" in row:
            return f"failed: {row['error'].partition(':')[0]}"
        text = show(row)
        if row["date"] != self.last["date"]:
            return f"{text} ({row['date'][5:]})"
        is_last = row.get("revision") == self.last.get("revision")
        return text if is_last else f"{text} ({row.get('revision')})"


def _size(shape: str) -> int:
    sizes = [int(number) for number in re.findall(r"\d+", shape)]
    return sizes[0] * sizes[-1]


def _step(row: Row) -> str:
    return f"{row['ms']:.0f} ms, {row['peak_gib']:.2f} GiB"


def _short_step(row: Row) -> str:
    return f"{row['ms']:.0f} ms, {row['peak_gib']:.1f} GiB"


def _tokens(row: Row) -> str:
    return f"{row['tokens_per_s']:.1f}"


def _microseconds(row: Row) -> str:
    return f"{1000 * row['ms']:.0f} us"


def _loss(row: Row) -> str:
    extra = f", {row['extra_mib']} MiB" if "extra_mib" in row else ""
    return f"{row['ms']:.1f} ms{extra}"


def _milliseconds(row: Row) -> str:
    return f"{row['ms']:.0f} ms"


def _relative(ours: float, row: Row) -> str:
    return f"{row['ms'] / ours:.1f}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    body = [list(line) for line in lines]
    if not body:
        return "Not measured yet."
    rows = [list(head), ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _grid(
    figures: Figures, section: str, methods: Sequence[str], show: Cell, corner: str
) -> list[list[str]]:
    """Return a head and a line for each shape; methods without a row are left out."""
    have = {row["method"] for row in figures.section(section)}
    columns = [method for method in methods if method in have]
    lines = [
        [shape, *(figures.cell(section, method, shape, show) for method in columns)]
        for shape in figures.shapes(section)
    ]
    return [[corner, *columns], *lines]


def _first(figures: Figures) -> str:
    """README's table: QST in bold beside what many use, all with checkpointing."""
    have = {row["method"] for row in figures.section("train")}
    shown = {method: title for method, title in _FIRST.items() if method in have}
    lines = []
    for shape in figures.shapes("train"):
        cells = [figures.cell("train", method, shape, _short_step) for method in (QST, *shown)]
        lines.append([f"{shape} tokens", f"**{cells[0]}**", *cells[1:]])
    title = f"LLaMA-2-7B, one training step on an {_card(figures.device)}"
    return table([title, QST, *shown.values()], lines)


def _train(figures: Figures) -> str:
    methods = (QST, PLAIN, *_PEERS, UNSLOTH)
    head, *lines = _grid(figures, "train", methods, _step, "tokens")
    for line in lines:
        line.append(figures.cell("train", FLOOR, line[0], _milliseconds))
    return table([*head, FLOOR], lines)


def _ratios(figures: Figures) -> str:
    """How many times as long as QST's the steps of others are."""
    head, *_ = _grid(figures, "train", (*_PEERS, UNSLOTH), _step, "tokens")
    lines = []
    for shape in figures.shapes("train"):
        ours = figures.newest.get(("train", QST, shape), {}).get("ms")
        if ours:
            show = partial(_relative, ours)
            lines.append([shape, *(figures.cell("train", m, shape, show) for m in head[1:])])
    return table(head, lines)


def _history(figures: Figures) -> str:
    """QST's step at each revision that was measured, on any device."""
    by: dict[tuple[str, str], Row] = {}
    for row in figures.all:
        if row["section"] == "train":
            when = f"{row['date']}, {row.get('revision')}, {_card(row['device'])}"
            by[when, row["shape"]] = row
    columns = list(dict.fromkeys(when for when, _ in by))
    lines = [
        [shape, *(_step(by[when, shape]) if (when, shape) in by else "" for when in columns)]
        for shape in figures.shapes("train")
    ]
    return table(["tokens", *columns], lines)


def _card(device: str) -> str:
    """Shorten ``NVIDIA H100 80GB HBM3`` to ``H100``."""
    return device.removeprefix("NVIDIA ").partition(" ")[0]


def _generate(figures: Figures) -> str:
    """Tokens a second of all rows together."""
    methods = (WITH_SIDE, ALONE, PEFT)
    return table(*_split(_grid(figures, "generate", methods, _tokens, "rows x new tokens")))


def _long(figures: Figures) -> str:
    return table(*_split(_grid(figures, "long", (QST, peers.PEFT_LIGER), _step, "tokens")))


def _dial(figures: Figures) -> str:
    return table(*_split(_grid(figures, "dial", (*DIAL, peers.TORCHTUNE), _step, "tokens")))


def _losses(figures: Figures) -> str:
    return table(*_split(_grid(figures, "loss", LOSSES, _loss, "forward and backward")))


def _decoding(figures: Figures) -> str:
    """Each way to decode a weight."""
    shapes = {row["method"]: row["shape"] for row in figures.section("pieces")}
    lines = [
        [method, figures.cell("pieces", method, shapes[method], _microseconds)]
        for method in DECODINGS
        if method in shapes
    ]
    return table(["one weight to bf16", *{shapes[method] for method, _ in lines}], lines)


def _products(figures: Figures) -> str:
    """Products of few and many tokens."""
    found: dict[int, dict[str, str]] = {}
    for row in figures.section("pieces"):
        named = re.fullmatch(r"product of (\d+) tokens, (.+)", row["method"])
        if named:
            text = figures.cell("pieces", row["method"], row["shape"], _microseconds)
            found.setdefault(int(named[1]), {})[named[2]] = text
    lines = [[str(n), *(found[n].get(name, "") for name in PRODUCTS)] for n in sorted(found)]
    return table(["tokens", *PRODUCTS], lines)


def _where(figures: Figures) -> str:
    """What the newest rows were measured with."""
    last = figures.last
    others = (f"{name} {text}" for name, text in last.get("versions", {}).items())
    packages = ", ".join([f"torch {last['torch']}", *others])
    return f"One {last['device']}, {last['date']}, revision {last.get('revision')}: {packages}."


def _split(grid: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return grid[0], grid[1:]


TABLES: dict[str, Callable[[Figures], str]] = {
    "first": _first,
    "where": _where,
    "train": _train,
    "ratios": _ratios,
    "history": _history,
    "generate": _generate,
    "long": _long,
    "dial": _dial,
    "loss": _losses,
    "decoding": _decoding,
    "products": _products,
}
