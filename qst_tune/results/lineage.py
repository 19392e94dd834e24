"""What a result was tuned from, for its card."""

from collections.abc import Sequence
from typing import Any


def describe_lineage(lineage: Sequence[dict[str, Any]]) -> str:
    """Write a lineage, oldest first (:mod:`~qst_tune.results.start`), as a Markdown table.

    Empty for a run that started from the untuned model.
    """
    if not lineage:
        return ""
    rows = [
        f"| {link.get('name')} | {link.get('steps') or ''} | "
        f"{', '.join(link.get('data') or [])} | `{str(link.get('digest'))[:16]}...` |"
        for link in lineage
    ]
    head = ["| started from | steps | data | tensors |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *rows, "", ""])
