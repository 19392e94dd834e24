"""The model card of a result, and the tables that a card for a hub has too."""

from collections.abc import Mapping, Sequence
from textwrap import fill

from qst_tune import __version__
from qst_tune.results.description import SIDE_NETWORK, Ancestor, Description


def model_card(description: Description) -> str:
    """Write the card of a run's result, Markdown."""
    return f"""\
# {description.title} for {description.backbone.name}

{_about(description)}

{table("model block", description.model)}

{table("result", {name: shown(value) for name, value in description.results.items()})}

{describe_lineage(description.lineage)}The run's config is in `recipe_config.yaml`.
"""


def _about(description: Description) -> str:
    backbone = description.backbone
    weights = f"whose weights have the fingerprint\n`{backbone.fingerprint[:16]}...`"
    if description.form is not SIDE_NETWORK:
        return f"""\
Made with qst_tune {__version__} by PEQA (https://arxiv.org/abs/2305.14152). It is not a model by
itself: it replaces the scales of {backbone.name} after rounding to integers
({backbone.quantization}), {weights}. The codes are the same for every task.
`tune run peqa_export --config <config> scales=<this directory>` writes the tuned model for other
programs."""
    usage = (
        "qst_chat --config auto/qst_chat side_network=<this directory> checkpoint_dir=<backbone>"
    )
    if description.is_classifier:
        usage = "qst_classify --config <config> side_network=<this directory> rows=<rows.jsonl>"
    return paragraph(
        f"Made with qst_tune {__version__}{_method(description)} {backbone.name} "
        f"({backbone.quantization}), {weights}, and is loaded with `tune run {usage}`."
    )


def _method(description: Description) -> str:
    """By which methods a side network's directory was made, and what that means for its use."""
    lora = description.structure.lora if description.structure else ""
    changes = f"{lora} (https://arxiv.org/abs/2106.09685)"
    if not description.has_side_network:
        return f": {changes}. It is not a model by itself: it changes what is computed in layers of"
    also = f", with {changes}" if lora else ""
    return (
        f" by Quantized Side Tuning (https://arxiv.org/abs/2401.07159){also}. It is not a model by "
        "itself and cannot be merged into one: it runs beside"
    )


def paragraph(text: str) -> str:
    """Break a text of one paragraph into lines."""
    return fill(" ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False)


def describe_lineage(lineage: Sequence[Ancestor]) -> str:
    """Write a lineage, oldest first, as a table in Markdown; empty if there is none."""
    if not lineage:
        return ""
    rows = [
        f"| {link.name} | {link.steps or ''} | {', '.join(link.data)} | `{link.digest[:16]}...` |"
        for link in lineage
    ]
    head = ["| started from | steps | data | tensors |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *rows, "", ""])


def shown(figure: float) -> str:
    """Format a figure for people: all digits of a count, four of a measurement."""
    return f"{figure:,}" if isinstance(figure, int) else f"{figure:,.4g}"


def table(title: str, rows: Mapping[str, object]) -> str:
    """Write names and values, if there are any, as a table in Markdown."""
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| {title} | |", "| --- | --- |", *lines]) if lines else ""
