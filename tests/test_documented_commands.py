"""Every command and snippet that is printed runs: with a tiny model and tiny data, in this process.

What cannot run here is marked where it is printed: ``<!-- not run: needs a GPU -->``.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from qst_tune.quickstart.smollm2 import default_cache_dir
from tests.support.documented_commands import ROOT, Printed, commands
from tests.support.printed_runs import Place, run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HEADS = sorted((ROOT / "configs").rglob("*.yaml"))


def pattern(printed: Printed) -> str:
    """What commands of different configs have in common."""
    family = "auto" if "qst_from_hf" in (ROOT / printed.place).read_text() else "named"
    text = re.sub(r"--config \S+/(?!135M)\S+", f"--config {family}", printed.text)
    return re.sub(r"\S+/\S+ --output-dir \S+", "MODEL", text)


FROM_HEADS = {pattern(printed): printed for path in HEADS for printed in commands(path)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("printed"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_and_snippets_of_a_page_run_one_after_the_other(page: Path, place: Place) -> None:
    failed = []
    for printed in commands(page):
        if printed.not_run is None:
            failed += problem_of(printed, place)
    assert not failed, "\n".join(failed)


def problem_of(printed: Printed, place: Place) -> list[str]:
    try:
        run(printed, place)
    except (Exception, SystemExit) as error:
        return [f"{printed}\n    {type(error).__name__}: {str(error)[:500]}"]
    return []


@pytest.mark.parametrize("printed", FROM_HEADS.values(), ids=FROM_HEADS)
def test_the_commands_in_the_heads_of_configs_run(printed: Printed, place: Place) -> None:
    if printed.not_run is None:
        run(printed, place)


# The test's own test.


@pytest.mark.parametrize(
    "command",
    [
        "tune run qst_finetune --config auto/qst checkpoint_dir=<DIR> batchsize=3",
        "tune run qst_finetune --config auto/absent",
        "tune run qst_absent --config auto/qst",
        "tune download --output-directory x",
        "make absent",
        "pip install qst_tune",
        'pip install ".[absent]"',
        "python -m qst_tune.sharing shar <RUN>",
        "python -m benchmarks.study --data x --methodes qst",
        "python -m absent",
        "tune run qst_chat --config auto/qst_generate side_network=<SOMETHING NEW>x",
    ],
)
def test_a_broken_command_fails(command: str, place: Place, capsys) -> None:
    assert problem_of(Printed("here", command), place)


def test_commands_are_found_in_every_place_and_marks_are_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Text with `tune ls` and `tune run a \\\n--config b` <!-- not run: needs a GPU -->.\n\n"
        "```sh\nmake test  # all\npython -m a \\\n  --b\noutput\n```\n\n    pip install .\n\n"
        "<!-- not run: needs a hub -->\n```\ntune download x\n```\n\n```python\nprint(1)\n```\n"
    )
    found = [(printed.text, printed.not_run) for printed in commands(page)]
    assert found == [
        ("tune ls", None),
        ("tune run a \\ --config b", "needs a GPU"),
        ("make test", None),
        ("python -m a --b", None),
        ("pip install .", None),
        ("tune download x", "needs a hub"),
        ("print(1)", None),
    ]


def test_the_notebook_is_the_tutorial_cell_by_cell() -> None:
    content = json.loads((ROOT / "docs/tutorial.ipynb").read_text())
    made = runpy.run_path(str(ROOT / "docs/make_notebook.py"))
    page = ROOT / "docs/tutorial.md"
    assert content == made["notebook"](page.read_text())
    code = [cell["source"] for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [text.removeprefix("%%bash\n") for text in code] == re.findall(
        r"```(?:sh|python)\n(.*?)\n```", page.read_text(), re.DOTALL
    )


@pytest.mark.slow
@pytest.mark.pretrained
def test_the_notebook_runs_with_the_real_model(tmp_path: Path) -> None:
    if not (default_cache_dir() / "SmolLM2-135M-Instruct").is_dir():
        pytest.skip("needs `make quickstart ARGS=--prepare-only`")
    cells = json.loads((ROOT / "docs/tutorial.ipynb").read_text())["cells"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        shell = cell["source"].startswith("%%bash\n")
        code = cell["source"].removeprefix("%%bash\n")
        program = ["bash", "-ec", code] if shell else [sys.executable, "-c", code]
        done = subprocess.run(
            program, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"
    assert re.search(r"\d+ of 48 right", done.stdout) or (tmp_path / "reviews_shared").is_dir()
