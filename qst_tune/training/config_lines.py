"""Where each key of a YAML file stands, for error messages."""

from pathlib import Path

import yaml


def lines_of(path: Path) -> dict[str, int]:
    """Return the line of each key, counted from 1, by dotted path as in ``dataset[0].packed``.

    Empty if the file cannot be parsed.
    """
    lines: dict[str, int] = {}
    try:
        root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    _collect(root, "", lines)
    return lines


def _collect(node: yaml.Node | None, path: str, lines: dict[str, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = f"{path}.{key.value}" if path else str(key.value)
            lines[child] = key.start_mark.line + 1
            _collect(value, child, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[f"{path}[{index}]"] = item.start_mark.line + 1
            _collect(item, f"{path}[{index}]", lines)
