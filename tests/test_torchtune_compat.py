"""Private names of torchtune are in one file, so that one file changes with its version."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_layout import ROOT, imported_names, module_name, source_files

COMPAT = ROOT / "qst_tune" / "torchtune_compat.py"
# They are imported by torchtune's own command line, before anything else of ours may be.
EXCEPTIONS = {COMPAT, ROOT / "qst_tune" / "plugin.py", ROOT / "qst_tune" / "cli_hints.py"}


def private_imports(source: str, module: str) -> list[str]:
    names = imported_names(source, module)
    return [n for n in names if n.startswith("torchtune.") and "._" in n]


def private_attributes(source: str) -> Iterator[str]:
    """Private attributes that are read of something other than ``self``, and not ``__dunder__``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not is_own and not node.attr.endswith("__"):
                yield node.attr


def others() -> list[Path]:
    return [path for path in source_files() if path not in EXCEPTIONS]


@pytest.mark.parametrize("path", others(), ids=module_name)
def test_no_other_file_uses_a_private_name(path: Path) -> None:
    source = path.read_text()
    assert private_imports(source, module_name(path)) == []
    of_torchtune = set(private_attributes(COMPAT.read_text()))
    assert of_torchtune.intersection(private_attributes(source)) == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from torchtune.config._utils import x", ["torchtune.config._utils.x"]),
        ("from torchtune.modules import _Mask", ["torchtune.modules._Mask"]),
        ("def f():\n    import torchtune._cli", ["torchtune._cli"]),
        ("from torchtune.modules import x", []),
        ("from torch._C import x", []),
    ],
)
def test_the_rule_itself(source: str, expected: list[str]) -> None:
    assert private_imports(source, "qst_tune.modules.a") == expected


def test_the_rule_of_attributes() -> None:
    assert list(private_attributes("a._b; self._c; a.d; a.__e__")) == ["_b"]
