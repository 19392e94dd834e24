"""Imports between our packages go one way, and setuptools sees every package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A package may import itself and what stands above it in this list.
LAYERS = [
    "quantization",
    "modules",
    "distributed",
    "backbone",
    "config",
    "models",
    "data",
    "results",
    "training",
    "generation",
    "evaluation",
    "sharing",
    "transformers",
    "estimation",
    "recipes",
    "quickstart",
]


def source_files() -> list[Path]:
    return sorted([*ROOT.glob("qst_tune/**/*.py"), *ROOT.glob("recipes/*.py")])


def module_name(path: Path) -> str:
    """Name of a file's module as installed: recipes/x.py is qst_tune.recipes.x."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "qst_tune" else ("qst_tune", *parts))


def imported_names(source: str, module: str) -> Iterator[str]:
    """Absolute names of everything that ``source``, the text of ``module``, imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def forbidden_imports(source: str, module: str) -> list[str]:
    """Imports in ``source`` of a layer of ours that stands below the one of ``module``.

    Files of qst_tune/ itself stand above all layers: all may import them (``errors``), and they
    import none (``plugin`` runs inside `import torch`).
    """
    layer = module.split(".")[1]
    allowed = LAYERS[: LAYERS.index(layer) + 1] if layer in LAYERS else []
    names = [name for name in imported_names(source, module) if name.startswith("qst_tune.")]
    return [n for n in names if n.split(".")[1] in LAYERS and n.split(".")[1] not in allowed]


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    assert forbidden_imports(path.read_text(), module_name(path)) == []


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("from qst_tune.models import x", "qst_tune.modules.a", ["qst_tune.models.x"]),
        ("from qst_tune import training", "qst_tune.models.a", ["qst_tune.training"]),
        ("from ..training import x", "qst_tune.models.a", ["qst_tune.training.x"]),
        ("def f():\n    import qst_tune.models", "qst_tune.plugin", ["qst_tune.models"]),
        ("from qst_tune.modules import x", "qst_tune.recipes.a", []),
        ("from . import b", "qst_tune.modules.a", []),
        ("from qst_tune import __version__", "qst_tune.modules.a", []),
    ],
)
def test_the_rule_itself(source: str, module: str, expected: list[str]) -> None:
    assert forbidden_imports(source, module) == expected


def test_every_package_is_a_layer() -> None:
    packages = {path.parent.name for path in ROOT.glob("qst_tune/*/*.py")}
    assert packages - set(LAYERS) == set()


def test_every_directory_with_code_is_a_package() -> None:
    # setup.py's find_packages() leaves a directory without __init__.py out of the wheel.
    directories = {path.parent for path in source_files()}
    assert [
        directory for directory in directories if not (directory / "__init__.py").is_file()
    ] == []
