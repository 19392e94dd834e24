"""The structure of the code: one-way imports, small files and functions, standard words.

A bound on a count (:data:`MOST`) only falls: lower it when the code is below it.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
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


# What may be in qst_tune/ and recipes/ at most.
MOST = {
    "lines": 33_100,
    "annotations with Any": 460,
    "lines of a file": 350,
    "parameters of a function": 10,
}
# Their parameters are the keys of a config's block, as those of torchtune's own builders are.
BUILDERS = ("qst_tune.models.", "qst_tune.data.auto_dataset")

# Words that the field does not use, and those it does. Names of other libraries are allowed.
GLOSSARY = {
    "folder": "directory",
    r"\bshall\b": "must, should",
    r"\bbut for\b": "except",
    r"held[-_ ]out": "validation set",
}
OF_OTHERS = re.compile(r"subfolder|upload_folder|folder_path")


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


# Circles.


def module_imports(source: str, module: str, modules: set[str]) -> set[str]:
    """Modules of ours that importing ``module`` imports: statements outside functions."""
    tree = ast.parse(source)
    later = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_for_types(function)
        for node in ast.walk(function)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) not in later and isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in imported_names(ast.unparse(node), module):
                parent = name.rpartition(".")[0]
                found |= {name} & modules or {parent} & modules
    return found - {module}


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other() -> None:
    names = {module_name(path).removesuffix(".__init__"): path for path in source_files()}
    imports = {
        name: module_imports(path.read_text(), module_name(path), set(names))
        for name, path in names.items()
    }
    assert circle(imports) == []
    assert any(imports.values())


def test_a_circle_is_found() -> None:
    ours = {"qst_tune.a", "qst_tune.b"}
    a = module_imports("from qst_tune.b import f", "qst_tune.a", ours)
    b = module_imports("import qst_tune.a", "qst_tune.b", ours)
    assert len(circle({"qst_tune.a": a, "qst_tune.b": b})) == 3
    late = module_imports("def f():\n    import qst_tune.a", "qst_tune.b", ours)
    assert circle({"qst_tune.a": a, "qst_tune.b": late}) == []


# Sizes.


@cache
def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the product, with the name of its module."""
    return [
        (module_name(path), node)
        for path in source_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """All but ``self`` and ``cls``."""
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    rest = [arg for arg in (function.args.vararg, function.args.kwarg) if arg is not None]
    return [arg for arg in [*named, *rest] if arg.arg not in ("self", "cls")]


def test_files_and_functions_are_small() -> None:
    sizes = {str(path): len(path.read_text().splitlines()) for path in source_files()}
    assert {path: n for path, n in sizes.items() if n > MOST["lines of a file"]} == {}
    assert sum(sizes.values()) <= MOST["lines"]
    most = MOST["parameters of a function"]
    long = [f"{m}.{f.name}" for m, f in functions() if len(parameters(f)) > most]
    # A kernel takes pointers and sizes one by one.
    long = [name for name in long if not name.rsplit(".", 2)[-2].startswith("triton_")]
    assert [name for name in long if not name.startswith(BUILDERS)] == []


def test_signatures_have_types() -> None:
    annotations = [
        annotation
        for _, function in functions()
        for annotation in [*(arg.annotation for arg in parameters(function)), function.returns]
        if annotation is not None
    ]
    count = sum(re.search(r"\bAny\b", ast.unparse(a)) is not None for a in annotations)
    assert 0 < count <= MOST["annotations with Any"]


# Names.


def test_no_file_is_named_after_nothing() -> None:
    names = {path.stem for path in source_files()}
    assert names & {"utils", "util", "helpers", "misc", "common"} == set()


@pytest.mark.parametrize("word", GLOSSARY)
def test_words_are_those_of_the_field(word: str) -> None:
    files = [*source_files(), *ROOT.glob("configs/**/*.yaml")]
    pattern = re.compile(rf"{word}", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if pattern.search(OF_OTHERS.sub("", line))
    ]
    assert found == [], f"write {GLOSSARY[word]}"


# The page that explains it.

PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_page_has_the_order_of_imports_and_every_directory() -> None:
    order = re.sub(r"\s+", " ", PAGE)
    assert " <- ".join(LAYERS) in order
    tree = PAGE.partition("## Layout")[2].partition("\n```\n")[2].partition("\n```\n")[0]
    listed = set(re.findall(r"^ *([\w/]+?(?:\.py|/))(?: |$)", tree, re.MULTILINE))
    own = {f"{p.name}/" for p in (ROOT / "qst_tune").iterdir() if (p / "__init__.py").is_file()}
    own |= {p.name for p in (ROOT / "qst_tune").glob("*.py") if p.name != "__init__.py"}
    top = {"qst_tune/", "recipes/", "configs/", "tests/", "benchmarks/", "docs/"}
    assert listed == own | top


def defined_names(path: Path) -> set[str]:
    """Classes, functions and variables at the top of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


ANSWERS = re.findall(r"^\| (.+\?) \| `(.+)` \| `(.+)` \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("question", "file", "name"), ANSWERS, ids=[a[0] for a in ANSWERS])
def test_one_file_answers_a_readers_question(question: str, file: str, name: str) -> None:
    assert name in defined_names(ROOT / file), question


def test_the_readers_questions_are_found() -> None:
    assert len(ANSWERS) >= 10


def test_no_room_behind_the_edge_reads_a_config_by_the_name_of_a_key() -> None:
    """A recipe parses its config once; what follows takes typed values."""
    readers = [
        module_name(path)
        for path in source_files()
        if re.search(r"\bcfg(\.get\(|\[)", path.read_text())
        and not module_name(path).startswith("qst_tune.config.")
    ]
    assert readers == []
