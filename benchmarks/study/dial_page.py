"""The page's part on the depth dial: tables at equal tokens, at equal time and of few rows."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from benchmarks.study.lines import Line, best_rates, figure_of
from benchmarks.study.methods import BACKBONES, METHODS, settings
from benchmarks.study.pareto import PICTURE, draw
from benchmarks.study.tasks import BATCH_SIZE, METRICS, STEPS, TASKS

_DIAL = {s.name for backbone in BACKBONES for s in settings(backbone) if s.depth}
_REFERENCES = ("lora", "qlora")
Seeds = dict[tuple[str, str, int], list[Line]]

_INTRODUCTION = """\
## The depth dial

LoRA of rank 16 in the last k of 30 layers (`lora_layers: k`), with and without the side network.
The model's published file is 4-bit already (Q4_1), so NF4 rounds it a second time. Forwards: the
products of a step in forwards of the whole model, 1 + 2k/30 with recomputation (as shipped) and
1 + k/30 with activations saved; checkpointed QLoRA takes 3. Rates are chosen as above. One seed
where no range is given.

    python -m benchmarks.study --data DIRECTORY --tune --methods dial,dial_nf4,lora,qlora
    python -m benchmarks.study --data DIRECTORY --tune --match time --methods dial,dial_nf4

`dial_nf4_rank_32` is over NF4 with a repair, `--device cuda` runs all on a GPU, `--rows 256
--states DIRECTORY` trains on few rows in several epochs, and `--costs 5` measures the steps.
"""


def is_shown_here(line: Line) -> bool:
    """Tell whether a run is in this part of the page, and not in the tables of all methods.

    Args:
        line (Line): of the results.

    Returns:
        bool: True for settings of the dial with LoRA, and for runs on few rows.
    """
    return line["method"] in _DIAL or line["rows"] is not None


def sections(lines: list[Line], costs: list[Line], docs: Path) -> list[str]:
    """Write the tables and draw the picture.

    Args:
        lines (list[Line]): of the results file.
        costs (list[Line]): what a step of each method takes.
        docs (Path): where the picture goes.

    Returns:
        list[str]: sections of Markdown; none before the dial was run.
    """
    if not any(is_shown_here(line) for line in lines):
        return []
    seeds = _by_setting(lines)
    parts = [_INTRODUCTION]
    for backbone, (_, over) in BACKBONES.items():
        for title, steps_of in _REGIMES.items():
            table = _table(seeds, backbone, steps_of)
            if table:
                parts.append(f"### {title}{over or ' over 8 bits'}\n\n{table}")
    few = _few_rows(lines)
    if few:
        parts.append(few)
    if draw(lines, costs, docs / PICTURE):
        parts.append(f"![Quality against time and memory]({PICTURE})\n")
    return parts


def _by_setting(lines: list[Line]) -> Seeds:
    """The seeds of a task, method and number of steps at their best rate."""
    usual = [
        line
        for line in lines
        if line["rows"] is None and line["batch_size"] == BATCH_SIZE[line["task"]]
    ]
    return {
        (task, seeds[0]["method"], seeds[0]["steps"]): seeds
        for task in TASKS
        for seeds in best_rates([line for line in usual if line["task"] == task])
    }


StepsOf = Callable[[str, str], int]
_REGIMES: dict[str, StepsOf] = {
    "Equal tokens": lambda task, _: STEPS[task],
    "The time of checkpointed QLoRA,": lambda task, name: (
        STEPS[task] if name in _REFERENCES else METHODS[name].steps_of_equal_time(STEPS[task])
    ),
    "The same, activations saved,": lambda task, name: (
        METHODS[f"{name}_saved"].steps_of_equal_time(STEPS[task]) if name in _DIAL else -1
    ),
}


def _table(seeds: Seeds, backbone: str, steps_of: StepsOf) -> str:
    """A line a setting, a column a task; nothing without a run of the dial."""
    names = {setting.name: setting.title for setting in settings(backbone)}
    references = {name: METHODS[name].title for name in _REFERENCES}
    found = {
        (name, task): seeds[task, name, steps_of(task, name)]
        for name in {**references, **names}
        for task in TASKS
        if (task, name, steps_of(task, name)) in seeds
    }
    if not any(name in _DIAL for name, _ in found):
        return ""
    tasks = [task for task in TASKS if any(task == other for _, other in found)]
    rows = [
        f"| trained | forwards | {' | '.join(f'{task}, {METRICS[task]}' for task in tasks)} |",
        "| --- " * (2 + len(tasks)) + "|",
    ]
    for name, title in {**names, **references}.items():
        cells = [figure_of(found[name, task]) if (name, task) in found else "" for task in tasks]
        if any(cells):
            rows.append(f"| {title} | {METHODS[name].forwards:.2f} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _few_rows(lines: list[Line]) -> str:
    """Several epochs over the same rows, and what the first and a later epoch took."""
    rows = [
        "### Few rows, several epochs\n",
        "| task | rows | epochs | method | result | states kept | first epoch, s | later ones, s |",
        "| --- " * 8 + "|",
    ]
    for task in TASKS:
        few = [line for line in lines if line["task"] == task and line["rows"]]
        for seeds in best_rates(few):
            first = seeds[0]
            seconds = first["seconds"]
            later = f"{mean(seconds[1:]):.1f}" if seconds[1:] else "-"
            rows.append(
                f"| {task} | {first['rows']} | {len(seconds)} | {METHODS[first['method']].title} "
                f"| {figure_of(seeds)} | {'yes' if first['states'] else 'no'} "
                f"| {seconds[0]:.1f} | {later} |"
            )
    return "\n".join(rows) + "\n" if rows[3:] else ""
