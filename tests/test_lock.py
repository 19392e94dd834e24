"""What CI installs is pinned by version and hash, and every extra has its versions."""

import re
import runpy
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCK = ROOT / ".ci" / "requirements.txt"
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
MADE = runpy.run_path(str(ROOT / ".ci" / "lock.py"))
CLOSURE = runpy.run_path(str(ROOT / "docs" / "make_licences.py"))["closure"]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    return {plain(n): v for n, v in re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)}


def test_the_lock_has_a_hash_for_each_version_of_ci_and_no_other() -> None:
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    locked = {plain(n): v for n, v in MADE["locked_versions"](CONSTRAINTS).items()}
    assert pins("\n".join(lines)) == locked
    assert len(lines) == len(locked)


def test_ci_installs_by_hash() -> None:
    assert f"LOCK={LOCK.relative_to(ROOT)}" in (ROOT / ".ci" / "run").read_text()
    assert "--require-hashes --no-deps -r $(LOCK)" in (ROOT / "Makefile").read_text()


def test_another_hash_is_refused(tmp_path: Path) -> None:
    name = "iniconfig"
    (line,) = [line for line in LOCK.read_text().splitlines() if line.startswith(name)]
    wheel = tmp_path / f"{line.split()[0].replace('==', '-')}-py3-none-any.whl"
    wheel.write_bytes(b"not the published file")
    (tmp_path / "lock.txt").write_text(line)
    options = ["--no-index", "--find-links", str(tmp_path), "--require-hashes", "--no-deps"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", *options]
    result = subprocess.run(
        [*command, "-r", str(tmp_path / "lock.txt")], capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "DO NOT MATCH THE HASHES" in result.stderr


def test_everything_that_ci_needs_is_pinned() -> None:
    needed = CLOSURE(("quickstart", "trl", "dev"))
    assert {plain(name) for name in needed} - pins(CONSTRAINTS).keys() == set()


@pytest.mark.parametrize("extra", ["quickstart", "eval", "trl", "serve", "dev"])
def test_every_extra_has_versions_that_are_in_its_range(extra: str) -> None:
    wanted = [Requirement(text) for text in requires("qst_tune") or []]
    ours = [r for r in wanted if r.marker is not None and r.marker.evaluate({"extra": extra})]
    assert ours
    for requirement in ours:
        assert requirement.specifier.contains(pins(CONSTRAINTS)[plain(requirement.name)])
