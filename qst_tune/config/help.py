"""The keys of a recipe for its reader: ``--help`` in the terminal, and the table in the docs.

``python -m qst_tune.config.help`` prints the table of docs/training.md.
"""

import sys
import textwrap
from typing import Any

from qst_tune.config.keys import NOUNS, TRAINING_KEYS, Keys

WIDTH = 96
_EPILOGUE = """\
A value follows the config file's key: batch_size=8 tokenizer.max_seq_len=1024. ~key removes a key.
`tune ls` lists the configs; `tune cp CONFIG FILE` copies one to change. Keys of a training config
that are not listed are accepted and not read."""


def help_text(recipe: str, doc: str, keys: Keys) -> str:
    """Describe a recipe: its usage, the purpose in its module's docstring, and its keys."""
    usage = f"usage: tune run {recipe} --config CONFIG [key=value ...]"
    lines = [line for name in keys for line in _lines_of(name, keys)]
    purpose = doc.strip().replace("``", "`")
    return "\n".join([usage, "", purpose, "", "keys:", *lines, "", _EPILOGUE, ""])


def _lines_of(name: str, keys: Keys) -> list[str]:
    """Name and values of a key, then its meaning and default, indented."""
    key = keys[name]
    choices = [str(choice) for choice in key.choices]
    values = "|".join(choices) if choices else NOUNS[key.kind].removeprefix("a ")
    # A non-breaking space: textwrap breaks lines at ASCII whitespace only.
    end = "required" if key.required else f"default:\xa0{_shown(key.default)}"
    return [f"  {name}: {values}", *_wrapped(f"{key.meaning} [{end}]")]


def _wrapped(text: str) -> list[str]:
    indent = " " * 6
    lines = textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return [line.replace("\xa0", " ") for line in lines]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def markdown_table(keys: Keys) -> str:
    """Describe keys as a Markdown table."""
    rows = [
        f"| `{name}` | {'required' if key.required else f'`{_shown(key.default)}`'} "
        f"| {key.meaning.replace('<', '&lt;')} |"
        for name, key in keys.items()
    ]
    return "\n".join(["| key | default | meaning |", "| --- | --- | --- |", *rows])


if __name__ == "__main__":
    sys.stdout.write(markdown_table(TRAINING_KEYS) + "\n")
