"""The outermost layer of a recipe: read the config, and turn a user's mistake into one line."""

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from qst_tune.config.file import lines_of, parse_config, split_arguments
from qst_tune.config.keys import NOUNS, Keys, RecipeConfig, keys_of
from qst_tune.config.schema import TRAINING_KEYS, TrainingConfig
from qst_tune.errors import ConfigError, UserError, one_line_errors
from qst_tune.terminal import hide_routine_lines, safe_streams

WIDTH = 96
_EPILOGUE = """\
A value follows the config file's key: batch_size=8 tokenizer.max_seq_len=1024. ~key removes a key.
`tune ls` lists the configs; `tune cp CONFIG FILE` copies one to change. Keys of a training config
that are not listed are accepted and not read."""


def run_recipe(
    recipe_main: Callable[[DictConfig], None],
    schema: type[RecipeConfig] = TrainingConfig,
    doc: str | None = None,
) -> None:
    """Run a recipe's main function on ``--config FILE key=value ...`` and exit.

    A user's mistake is printed as :func:`~qst_tune.errors.one_line_errors` does. ``--help`` prints
    the recipe's docstring ``doc`` and its keys.
    """
    hide_routine_lines()
    with safe_streams():
        if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
            sys.stdout.write(help_text(Path(sys.argv[0]).stem, doc or "", keys_of(schema)))
            sys.exit(0)
        try:
            with one_line_errors(_with_places):
                recipe_main(parse_config(sys.argv[1:]))
        except KeyboardInterrupt:
            sys.exit(130)


def _with_places(error: UserError) -> list[str]:
    """The message's lines; each mistake of the config file with its line there."""
    if not isinstance(error, ConfigError):
        return str(error).splitlines()
    path, overrides = split_arguments(sys.argv[1:])
    places = lines_of(path)
    overridden = tuple(text.partition("=")[0] for text in overrides)
    lines = []
    for problem in error.problems:
        line = None if problem.key.startswith(overridden) else places.get(problem.key)
        lines.append(f"config: {problem.text}" + (f" ({path}:{line})" if line else ""))
    return lines


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


def _shown(value: object) -> str:
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
