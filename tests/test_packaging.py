"""The wheel alone, without this repository, gives the stock `tune` our recipes and configs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import qst_tune
from tests.support.checkpoints import finetune_config, write_config
from tests.support.recipe_runs import run_tune

ROOT = Path(__file__).parent.parent
DISTRIBUTED = ["pyproject.toml", "setup.py", "README.md", "LICENSE"]
DIRECTORIES = ["qst_tune", "recipes", "configs"]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside the repository and return what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our wheel, built from a copy: setuptools leaves a build directory beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in DISTRIBUTED:
        shutil.copy(ROOT / name, source / name)
    for name in DIRECTORIES:
        no_caches = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=no_caches)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index"]
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", out, source, cwd=source)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with our wheel in it, and torch from this one.

    A .pth file adds this environment's packages after the new one's own. Python does not read the
    .pth files of a directory that a .pth file adds, so an editable qst_tune is not found that way.
    """
    env = tmp_path_factory.mktemp("env")
    run(sys.executable, "-m", "venv", "--without-pip", env, cwd=env)
    python = env / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=env)
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages(python) / "this_environment.pth").write_text("\n".join(sorted(here)) + "\n")
    return python


def site_packages(python: Path) -> Path:
    return next((python.parent.parent / "lib").glob("python*")) / "site-packages"


def test_wheel_holds_every_file_of_the_three_directories_and_nothing_else(wheel: Path) -> None:
    paths = [
        path
        for directory in DIRECTORIES
        for path in (ROOT / directory).rglob("*")
        if path.is_file()
    ]
    in_tree = {p.relative_to(ROOT).as_posix() for p in paths if p.parent.name != "__pycache__"}
    expected = {f if f.startswith("qst_tune/") else f"qst_tune/{f}" for f in in_tree}
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in packed if ".dist-info/" not in name} == expected
    assert any(name.endswith("LICENSE") for name in packed)


def test_wheel_has_the_version_of_the_package(wheel: Path) -> None:
    assert wheel.name.startswith(f"qst_tune-{qst_tune.__version__}-")


def test_packages_are_found_in_site_packages(python: Path, tmp_path: Path) -> None:
    code = """if True:
        from importlib.util import find_spec
        for name in ("qst_tune", "qst_tune.recipes", "qst_tune.configs"):
            print(find_spec(name).origin)
    """
    origins = [Path(line) for line in run(python, "-c", code, cwd=tmp_path).splitlines()]
    inside = site_packages(python) / "qst_tune"
    directories = [inside, inside / "recipes", inside / "configs"]
    assert origins == [directory / "__init__.py" for directory in directories]


def test_tune_lists_and_copies_ours(python: Path, tmp_path: Path) -> None:
    # `tune` itself is a script of the environment that torchtune was installed into.
    code = """if True:
        import sys
        from torchtune._cli.tune import main
        for command in ("ls", "cp smollm2/135M_qst mine.yaml"):
            sys.argv = ["tune", *command.split()]
            main()
    """
    listed = run(python, "-c", code, cwd=tmp_path).split()
    assert {"qst_finetune", "smollm2/135M_qst"} <= set(listed)
    copy, original = tmp_path / "mine.yaml", ROOT / "configs" / "smollm2" / "135M_qst.yaml"
    assert copy.read_bytes() == original.read_bytes()


def test_tune_trains_two_steps(python: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "tiny.yaml", finetune_config(tmp_path))
    result = run_tune("run", "qst_finetune", "--config", path, cwd=tmp_path, python=python)
    assert result.returncode == 0, result.stderr
    losses = json.loads((tmp_path / "run" / "summary.json").read_text())["train_loss"]
    assert list(losses) == ["1", "2"]
    assert (tmp_path / "run" / "side_network" / "side_network.safetensors").is_file()


def test_quickstart_runs_from_the_wheel(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qst_tune.quickstart import smollm2

    model = tmp_path / "qst_tune" / smollm2.MODEL_NAME  # as after a download
    model.mkdir(parents=True)
    for name in smollm2._MODEL_FILES:
        (model / name).touch()
    (model / smollm2._SOURCE_NAME).write_text(smollm2._SOURCE_TEXT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    printed = run(python, "-m", "qst_tune.quickstart", "--prepare-only", cwd=tmp_path)
    assert "training examples" in printed
    assert (tmp_path / "qst_tune" / "python_docs" / "train.jsonl").stat().st_size > 100_000
