"""Make docs/tutorial.ipynb of docs/tutorial.md, so that the two cannot differ.

Blocks of Python and of shell become cells, the block of text behind one becomes its output, and
everything else stays text::

    python docs/make_notebook.py
"""

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("tutorial.md")
_BLOCK = re.compile(r"```(?P<label>\w+)\n(?P<body>.*?)```\n", re.DOTALL)


def notebook(markdown: str) -> dict[str, Any]:
    """Return the notebook of a page.

    Args:
        markdown (str): the page.

    Returns:
        dict[str, Any]: of Jupyter's format 4.5.
    """
    cells: list[dict[str, Any]] = []
    end = 0
    for block in _BLOCK.finditer(markdown):
        _add_text(cells, markdown[end : block.start()])
        _add_block(cells, block["label"], block["body"].rstrip("\n"))
        end = block.end()
    _add_text(cells, markdown[end:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _add_text(cells: list[dict[str, Any]], text: str) -> None:
    if text.strip():
        cells.append({"cell_type": "markdown", "metadata": {}, "source": text.strip()})


def _add_block(cells: list[dict[str, Any]], label: str, body: str) -> None:
    if label == "text":
        cells[-1]["outputs"] = [{"name": "stdout", "output_type": "stream", "text": f"{body}\n"}]
        return
    source = f"%%bash\n{body}" if label == "sh" else body
    cells.append(
        {
            "cell_type": "code",
            "execution_count": None,
            "metadata": {},
            "outputs": [],
            "source": source,
        }
    )


def main() -> None:
    """Write the notebook beside its page."""
    content = notebook(PAGE.read_text(encoding="utf-8"))
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    PAGE.with_suffix(".ipynb").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
